"""Several files that are one network become one model; ``split_files`` goes the way back.

An encoder, the first step of a decoder and its step with a cache stand in files of their own. They
hold the same weights, and what one gives another takes, so that they can only be resized together.
Joined they are one graph in which this is plain: a weight of several files is one initializer with
several readers, and an input that another file feeds is that file's result. Nothing else has to
know of files: groups over all of them are connected components as ever.

    encoder:  ids -> hidden                    encoder/ids, decoder/ids, step/ids
    decoder:  ids, hidden -> logits, present   -> encoder/hidden, decoder/logits, decoder/present,
    step:     ids, past -> logits, present        step/logits, step/present

What goes from file to file stays among the results, and is free: all who take it follow.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import onnx_ir as ir

from morphgraph.edit import name_nodes
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import escape, graphs_of, values_of
from morphgraph.onnx_io.copies import copied
from morphgraph.onnx_io.keys import JOINED_KEY, ORIGIN_KEYS, OWN_PREFIX
from morphgraph.passes.canonical.inline import inline_functions, sort_nodes
from morphgraph.passes.canonical.shared_weights import shared_weights
from morphgraph.passes.canonical.symbols import addends, plain_names


@dataclass(frozen=True)
class Part:
    """One of several models that are one network.

    Attributes:
        name: unlike those of the others.
        model: is not changed.
        choice: of one of two networks that a file holds: where it stands.
    """

    name: str
    model: ir.Model
    choice: "Choice | None" = None


@dataclass(frozen=True)
class Feed:
    """An input of a part that is what another part gives.

    Attributes:
        part, taken: the part by its place, and its input.
        source, given: the other part by its place, and its output.
    """

    part: int
    taken: str
    source: int
    given: str


class Choice(msgspec.Struct, frozen=True):
    """Which of the two networks of a file a part is: an input of the file chooses.

    Attributes:
        file: the name of the file, which both parts have.
        flag: the input.
        value: what it is for this one.
        place: of the input among the file's.
        shape: of the input.
    """

    file: str
    flag: str
    value: bool
    place: int
    shape: list[int]


class Layout(msgspec.Struct, frozen=True):
    """Where a part stands in a joined model: values of the part by their names in its own file.

    Attributes:
        name: of the part.
        inputs: by input the value of the joined model that it is, in the part's order.
        outputs: the same of outputs.
        weights: by initializer of the joined model the name that it has in the file.
        sizes: by input or output the declared size of every axis; ``None`` where there is none.
        empty: by output that holds no numbers, whatever is run, its sizes; it is not in the model.
        choice: of one of two networks that a file holds: where it stands.
        metadata: what others have noted in the file.
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    weights: dict[str, str]
    sizes: dict[str, list[int | str | None]]
    empty: dict[str, list[int]] = {}
    choice: Choice | None = None
    metadata: dict[str, str] = {}


class Layouts(msgspec.Struct, frozen=True):
    """What a joined model notes of its parts, in its metadata.

    Attributes:
        parts: in order.
        free: outputs that only other parts take, so that they may change their size.
    """

    parts: list[Layout]
    free: list[str]

    def takes_of_others(self, part: Layout) -> bool:
        """Whether a part takes what another one gives."""
        return any(not joined.startswith(f"{part.name}/") for joined in part.inputs.values())


def layouts(model: ir.Model) -> Layouts | None:
    """What a model says of the files that it was joined of; ``None``: it is one file's own.

    What a file says there and this program has not written is passed over.
    """
    noted = model.metadata_props.get(JOINED_KEY)
    try:
        return None if noted is None else msgspec.json.decode(noted, type=Layouts)
    except msgspec.MsgspecError:
        return None


def free_outputs(model: ir.Model) -> frozenset[str]:
    """Outputs that only other files of a network take; none where a model is no joined one."""
    noted = layouts(model)
    return frozenset() if noted is None else frozenset(noted.free)


def join_files(parts: Sequence[Part], feeds: Sequence[Feed]) -> ir.Model:
    """One model of several that are one network.

    A feed of an input that the part does not read, and one from a part to itself, join nothing:
    they only say which size the input has. Outputs that feeds name are free in both parts: what is
    behind another run's past is a past again.

    Args:
        parts: each behind those that feed it.
        feeds: which input is which output.

    Raises:
        UnsupportedError: the parts are of different opsets.
    """
    _require_one_opset(parts)
    models = [_own(part.model) for part in parts]
    weights = shared_weights([part.name for part in parts], models)
    _rename(parts, models, weights)
    names = _size_names(models, feeds, parts)
    for model, renamed in zip(models, names, strict=True):
        _name_sizes(model, renamed)
    inputs = [{_inner(v, p): v for v in m.graph.inputs} for m, p in zip(models, parts, strict=True)]
    outputs = [_outputs(m, p) for m, p in zip(models, parts, strict=True)]
    fed: dict[tuple[int, str], ir.Value] = {}
    for feed in feeds:
        taken, given = inputs[feed.part][feed.taken], outputs[feed.source][feed.given]
        fed[feed.part, feed.taken] = given
        if feed.part != feed.source:
            taken.replace_all_uses_with(given)
    laid = []
    for place, part in enumerate(parts):
        taken_as = {name: fed.get((place, name), value) for name, value in inputs[place].items()}
        laid.append(_layout(part, taken_as, outputs[place], weights[place]))
    free = {value.name or "" for value in fed.values()} | _continued(feeds, outputs)
    joined = _joined(
        models,
        [v for place, own in enumerate(inputs) for n, v in own.items() if (place, n) not in fed],
        [value for own in outputs for value in own.values()],
    )
    noted = Layouts(laid, sorted(free))
    joined.metadata_props.update(_common_origin(parts))
    joined.metadata_props[JOINED_KEY] = msgspec.json.encode(noted).decode()
    return joined


def _joined(
    models: Sequence[ir.Model], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> ir.Model:
    """One model that takes over the nodes of several, which are empty then.

    An initializer that several hold under one name is one with all their readers.
    """
    constants = {name: value for model in models for name, value in _constants(model).items()}
    nodes: list[ir.Node] = []
    opsets: dict[str, int] = {}
    for model in models:
        for name, value in _constants(model).items():
            if value is not constants[name]:
                value.replace_all_uses_with(constants[name])
        opsets.update(model.graph.opset_imports)
        own = list(model.graph)
        model.graph.outputs.clear()
        model.graph.inputs.clear()
        model.graph.remove(own)
        nodes += own
    for model in models:
        model.graph.initializers.clear()
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports=opsets,
        name="joined",
    )
    sort_nodes(graph)
    return ir.Model(graph, ir_version=max(model.ir_version for model in models))


def _constants(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for value in model.graph.initializers.values()}


def _layout(
    part: Part,
    inputs: Mapping[str, ir.Value],
    outputs: Mapping[str, ir.Value],
    weights: dict[str, str],
) -> Layout:
    """Where a part stands: its inputs and outputs as values of the joined model."""
    empty = {v.name or "": empty_shape(v) for v in part.model.graph.outputs}
    noted = part.model.metadata_props
    return Layout(
        part.name,
        {name: value.name or "" for name, value in inputs.items()},
        {name: value.name or "" for name, value in outputs.items()},
        weights,
        _declared(part.model),
        {name: list(shape) for name, shape in empty.items() if shape is not None},
        part.choice,
        {key: text for key, text in noted.items() if not key.startswith(OWN_PREFIX)},
    )


def _common_origin(parts: Sequence[Part]) -> dict[str, str]:
    """Where all files come from together, if they do: they were resized as one network."""
    noted = [{key: part.model.metadata_props.get(key) for key in ORIGIN_KEYS} for part in parts]
    common = noted[0] if all(each == noted[0] for each in noted) else {}
    return {key: text for key, text in common.items() if text is not None}


def _require_one_opset(parts: Sequence[Part]) -> None:
    """Refuse parts that mean different things by one operator."""
    for domain in {domain for part in parts for domain in part.model.opset_imports}:
        versions = {
            part.name: part.model.opset_imports[domain]
            for part in parts
            if domain in part.model.opset_imports
        }
        if len(set(versions.values())) > 1:
            told = ", ".join(f"{escape(name)} {number}" for name, number in versions.items())
            raise UnsupportedError(
                f"the files are of different opsets ({told}): they cannot be resized as one "
                "network; export them again with one opset"
            )


def _own(model: ir.Model) -> ir.Model:
    """A copy without functions, with nodes that have names."""
    own = copied(model)
    inline_functions(own)
    sort_nodes(own.graph)
    name_nodes(own.graph)
    return own


def _rename(
    parts: Sequence[Part], models: Sequence[ir.Model], weights: Sequence[Mapping[str, str]]
) -> None:
    """Give all that a part has a name with the part's before it, but for weights."""
    for part, model, named in zip(parts, models, weights, strict=True):
        joined_names = {name: joined for joined, name in named.items()}
        for graph in graphs_of(model):
            constants = list(graph.initializers.values()) if graph is model.graph else []
            for value in values_of(graph):
                if value.name and value not in constants:
                    value.name = f"{part.name}/{value.name}"
            for node in graph:
                node.name = f"{part.name}/{node.name}" if node.name else node.name
            for value in constants:
                graph.initializers.pop(value.name or "")
            for value in constants:
                value.name = joined_names[value.name or ""]
                graph.initializers[value.name] = value


def _inner(value: ir.Value, part: Part) -> str:
    """The name of an input or output in its part's file."""
    return (value.name or "").removeprefix(f"{part.name}/")


def _outputs(model: ir.Model, part: Part) -> dict[str, ir.Value]:
    """By name the outputs of a part, each made by a node, and by none of another output."""
    found: dict[str, ir.Value] = {}
    for place, value in enumerate(list(model.graph.outputs)):
        if empty_shape(value) is not None:
            continue
        name = _inner(value, part)
        if value.producer() is None or value in found.values():
            end = ir.Node("", "Identity", [value], name=f"{part.name}/{name}_given_{place}")
            result = end.outputs[0]
            result.type, result.shape = value.type, value.shape
            result.name = f"{part.name}/{name}_given_{place}"
            model.graph.append(end)
            value = result
        found[name] = value
    return found


def empty_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a constant without numbers, which stands for what a branch does not give."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
    elif value.const_value is not None:
        tensor = value.const_value
    else:
        return None
    return tuple(tensor.shape.numpy()) if tensor.size == 0 else None


def _declared(model: ir.Model) -> dict[str, list[int | str | None]]:
    """The sizes that inputs and outputs of a file declare."""
    return {
        value.name or "": [
            size if isinstance(size, int) else size.value for size in value.shape or ()
        ]
        for value in (*model.graph.inputs, *model.graph.outputs)
    }


def _continued(feeds: Iterable[Feed], outputs: Sequence[Mapping[str, ir.Value]]) -> set[str]:
    """Outputs under a name by which some part is fed, in all parts: what follows a past is one."""
    given = {feed.given for feed in feeds}
    return {value.name or "" for each in outputs for name, value in each.items() if name in given}


def _size_names(
    models: Sequence[ir.Model], feeds: Sequence[Feed], parts: Sequence[Part]
) -> list[dict[str, str]]:
    """By part what its open sizes are called in the joined model, where a feed does not say.

    A size that a fed input has is what the other part's output has there: a name of that part, or a
    sum of its names. Names that no input of that part has count nothing (a past that never comes).
    """
    found: list[dict[str, str]] = []
    for place, (model, part) in enumerate(zip(models, parts, strict=True)):
        mine: dict[str, str] = {}
        for feed in feeds:
            if feed.part != place or feed.source == place:
                continue
            taken = _axes(parts[place].model.graph.inputs, feed.taken)
            given = _axes(parts[feed.source].model.graph.outputs, feed.given)
            theirs = found[feed.source]
            known = plain_names(parts[feed.source].model)
            for axis, (own, other) in enumerate(zip(taken, given, strict=False)):
                if axis and isinstance(own, ir.SymbolicDim) and own.value:
                    text = _in_terms(other, known, theirs)
                    if text:
                        mine.setdefault(own.value, text)
        for name in sorted(plain_names(model)):
            mine.setdefault(name, f"{name}_{part.name}")
        found.append(mine)
    return found


def _axes(values: Iterable[ir.Value], name: str) -> Sequence[int | ir.SymbolicDim]:
    return next((list(v.shape or ()) for v in values if v.name == name), [])


def _in_terms(
    size: int | ir.SymbolicDim, known: Iterable[str], names: Mapping[str, str]
) -> str | None:
    """A size of a part in the joined model's names; ``None`` where nothing is known of it."""
    if isinstance(size, int):
        return str(size)
    if size.value in names:
        return names[size.value or ""]
    parts = [part.strip() for part in (size.value or "").split("+")]
    left = [part for part in parts if part in known or part.isdecimal()]
    if not left or not all(part.replace("_", "").isalnum() for part in parts):
        return None
    return " + ".join(names.get(part, part) for part in left)


def _name_sizes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Write the open sizes of inputs and outputs in the joined model's names."""
    known = plain_names(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        dims: list[int | ir.SymbolicDim] = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int) or axis == 0 or dim.value is None:
                dims.append(dim)
                continue
            terms, number = addends(dim, known)
            if dim.value in names:
                dims.append(_size(names[dim.value]))
            elif terms:
                texts = [names.get(name, name) for name, n in terms.items() for _ in range(n)]
                dims.append(_size(" + ".join(texts + ([str(number)] if number else []))))
            else:
                dims.append(ir.SymbolicDim(None))
        value.shape = ir.Shape(dims)
    # What is declared inside is in names of the file; it is inferred again.
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs and value.shape is not None:
                value.shape = ir.Shape(
                    [size if isinstance(size, int) else None for size in value.shape]
                )


def _size(text: str) -> int | ir.SymbolicDim:
    return int(text) if text.isdecimal() else ir.SymbolicDim(text)
