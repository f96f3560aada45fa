"""Several files that are one network become one model, and one model such files again.

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

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.edit import name_nodes
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.onnx_io import escape, graphs_of, is_float, values_of
from morphgraph.onnx_io.copies import copied
from morphgraph.onnx_io.keys import JOINED_KEY
from morphgraph.passes.canonical.inline import inline_functions, sort_nodes
from morphgraph.passes.canonical.symbols import addends, plain_names

_Key = tuple[ir.DataType, tuple[int, ...], bytes]


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
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    weights: dict[str, str]
    sizes: dict[str, list[int | str | None]]
    empty: dict[str, list[int]] = {}
    choice: Choice | None = None


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
    """What a model says of the files that it was joined of; ``None``: it is one file's own."""
    noted = model.metadata_props.get(JOINED_KEY)
    return None if noted is None else msgspec.json.decode(noted, type=Layouts)


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
    weights = _shared_weights(parts, models)
    _rename(parts, models, weights)
    names = _size_names(models, feeds, parts)
    for model, renamed in zip(models, names, strict=True):
        _name_sizes(model, renamed)
    first = models[0]
    inputs = [{_inner(v, p): v for v in m.graph.inputs} for m, p in zip(models, parts, strict=True)]
    outputs = [_outputs(m, p) for m, p in zip(models, parts, strict=True)]
    sizes = [_declared(part.model) for part in parts]
    fed: dict[tuple[int, str], ir.Value] = {}
    for feed in feeds:
        taken, given = inputs[feed.part][feed.taken], outputs[feed.source][feed.given]
        fed[feed.part, feed.taken] = given
        if feed.part != feed.source:
            taken.replace_all_uses_with(given)
    constants = {
        value.name or "": value for model in models for value in model.graph.initializers.values()
    }
    for model in models:
        for value in list(model.graph.initializers.values()):
            one = constants[value.name or ""]
            if value is not one:
                value.replace_all_uses_with(one)
    nodes: list[ir.Node] = []
    taken_in: list[ir.Value] = []
    given_out: list[ir.Value] = []
    for place, model in enumerate(models):
        own = list(model.graph)
        taken_in += [v for name, v in inputs[place].items() if (place, name) not in fed]
        given_out += outputs[place].values()
        model.graph.outputs.clear()
        model.graph.inputs.clear()
        model.graph.remove(own)
        nodes += own
    for model in models:
        model.graph.initializers.clear()
    free = {value.name or "" for value in fed.values()}
    free |= _continued(feeds, outputs)
    noted = Layouts(
        [
            Layout(
                part.name,
                {
                    name: (fed.get((place, name)) or value).name or ""
                    for name, value in inputs[place].items()
                },
                {name: value.name or "" for name, value in outputs[place].items()},
                weights[place],
                sizes[place],
                {
                    v.name or "": list(shape)
                    for v in part.model.graph.outputs
                    if (shape := empty_shape(v)) is not None
                },
                part.choice,
            )
            for place, part in enumerate(parts)
        ],
        sorted(free),
    )
    graph = ir.Graph(
        taken_in,
        given_out,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports=dict(first.graph.opset_imports),
        name="joined",
    )
    for model in models[1:]:
        graph.opset_imports.update(model.graph.opset_imports)
    joined = ir.Model(graph, ir_version=max(model.ir_version for model in models))
    joined.metadata_props[JOINED_KEY] = msgspec.json.encode(noted).decode()
    sort_nodes(graph)
    return joined


def split_files(model: ir.Model) -> dict[str, ir.Model]:
    """By name of a part the model that it is: what a joined one, resized or not, holds of it.

    Inputs and outputs are those of the part's file, in order, and so are their open sizes.

    Args:
        model: is not changed.

    Raises:
        ModelError: it is not joined of several, or something of a part is not there any more.
    """
    noted = layouts(model)
    if noted is None:
        raise ModelError("the model is not joined of several files; save it as it is")
    return {part.name: _part_of(model, part) for part in noted.parts}


def files_of(model: ir.Model) -> dict[str, ir.Model]:
    """By name of a file the model that it holds, of a joined one: as :func:`split_files`.

    A file of two networks gets both again, in the branches of an If.

    Args:
        model: is not changed.
    """
    parts, noted = split_files(model), layouts(model)
    assert noted is not None
    found: dict[str, ir.Model] = {}
    pairs: dict[str, dict[bool, Layout]] = {}
    for part in noted.parts:
        if part.choice is None:
            found[part.name] = parts[part.name]
        else:
            pairs.setdefault(part.choice.file, {})[part.choice.value] = part
    for file, pair in pairs.items():
        found[file] = _merged(pair, {value: parts[part.name] for value, part in pair.items()})
    return found


# -- join ------------------------------------------------------------------------------------------


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


def _shared_weights(parts: Sequence[Part], models: Sequence[ir.Model]) -> list[dict[str, str]]:
    """By part, and by the name that an initializer has in the joined model, that in the file.

    Weights of two files are one where they hold the same numbers: under the same name, or where
    both files have as many of them, in the order in which they are used. Vectors of one number over
    and over (biases at zero, scales at one) are alike everywhere, so that there only names tell.
    """
    alike = Counter(
        kind for model in models for kind in {_kind(v) for v in model.graph.initializers.values()}
    )
    found: list[dict[str, str]] = []
    taken: set[str] = set()
    classes: dict[_Key, list[dict[str, None]]] = {}  # of a content the weights, by all their names
    joined_name: dict[int, str] = {}  # by id of a weight's names
    for part, model in zip(parts, models, strict=True):
        mine: dict[str, str] = {}
        contents: dict[_Key, list[ir.Value]] = {}
        for value in _by_use(model):
            if is_float(value) and alike[_kind(value)] > 1 and len(value.shape or ()):
                contents.setdefault(_key(value), []).append(value)
        pairs: dict[str, dict[str, None]] = {}
        for key, values in contents.items():
            known = classes.setdefault(key, [])
            pairs |= _paired(values, known)
            for value in values:
                if (value.name or "") not in pairs:
                    names: dict[str, None] = {}
                    known.append(names)
                    pairs[value.name or ""] = names
        for name in [value.name or "" for value in model.graph.initializers.values()]:
            one = pairs.get(name)
            if one is not None and id(one) in joined_name:
                wanted = joined_name[id(one)]
            else:
                wanted = name if name not in taken else f"{part.name}/{name}"
                if one is not None:
                    joined_name[id(one)] = wanted
            if one is not None:
                one[name] = None
            taken.add(wanted)
            mine[wanted] = name
        found.append(mine)
    return found


def _paired(
    values: Sequence[ir.Value], known: Sequence[dict[str, None]]
) -> dict[str, dict[str, None]]:
    """Which weights of a file are weights of others, of those that hold the same numbers."""
    found: dict[str, dict[str, None]] = {}
    left, others = list(values), list(known)
    for value in values:
        one = next((names for names in others if (value.name or "") in names), None)
        if one is not None:
            found[value.name or ""] = one
            left.remove(value)
            others = [names for names in others if names is not one]
    if left and len(left) == len(others) and not _is_uniform(left[0]):
        found |= {value.name or "": one for value, one in zip(left, others, strict=True)}
    return found


def _kind(value: ir.Value) -> tuple[object, ...]:
    tensor = value.const_value
    return (None,) if tensor is None else (tensor.dtype, tuple(tensor.shape.numpy()))


def _key(value: ir.Value) -> _Key:
    tensor = value.const_value
    assert tensor is not None
    return (
        tensor.dtype,
        tuple(tensor.shape.numpy()),
        hashlib.sha256(np.ascontiguousarray(tensor.numpy()).data).digest(),
    )


def _is_uniform(value: ir.Value) -> bool:
    assert value.const_value is not None
    array = value.const_value.numpy().reshape(-1)
    return not array.size or bool((array == array[0]).all())


def _by_use(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers in the order in which nodes read them; those that nobody reads are left."""
    seen: dict[ir.Value, None] = {}
    for graph in graphs_of(model):
        for node in graph:
            seen |= {v: None for v in node.inputs if v is not None and v.is_initializer()}
    yield from (value for value in seen if value.graph is model.graph)


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


# -- split -----------------------------------------------------------------------------------------


def _part_of(model: ir.Model, part: Layout) -> ir.Model:
    """A part of a joined model as a model of its own, with the names of its file."""
    own = copied(model)
    own.meta.clear()
    graph = own.graph
    values = {value.name or "": value for value in values_of(graph)}
    # Caches of heads that are gone are in no file any more.
    outputs = {name: values[joined] for name, joined in part.outputs.items() if joined in values}
    graph.outputs.clear()
    graph.outputs.extend(outputs.values())
    inputs: list[ir.Value] = []
    for name, joined in part.inputs.items():
        value = values.get(joined)
        if value is None:
            continue
        source = ir.Value(name=f"{part.name}/{name}", type=value.type)
        source.shape = _declared_shape(part.sizes[name], value)
        if value not in outputs.values():  # else it only says the size of what nobody reads
            value.replace_all_uses_with(source)
        inputs.append(source)
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    common.RemoveUnusedNodesPass()(own)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name or "")
    own.metadata_props.pop(JOINED_KEY)
    _name_as_in_file(own, part)
    for name, value in outputs.items():
        value.name = name
        value.shape = _declared_shape(part.sizes[name], value)
    return own


def _declared_shape(sizes: Sequence[int | str | None], value: ir.Value) -> ir.Shape | None:
    """The shape that a file declares of an input or output, at the sizes that it has now."""
    if value.shape is None or len(value.shape) != len(sizes):
        return ir.Shape([size if isinstance(size, str) else None for size in sizes])
    return ir.Shape(
        [
            new if isinstance(old, int) and isinstance(new, int) else old
            for old, new in zip(sizes, value.shape, strict=True)
        ]
    )


def _name_as_in_file(model: ir.Model, part: Layout) -> None:
    """Take the part's name off all names, and give weights those that they have in the file."""
    prefix = f"{part.name}/"
    graph = model.graph
    constants = list(graph.initializers.values())
    outputs = set(graph.outputs)
    taken = set(part.weights.values()) | {*part.inputs, *part.outputs}
    for each in graphs_of(model):
        for value in values_of(each):
            if value in constants or not value.name:
                continue
            value.name = value.name.replace(prefix, "")  # also where it is named after a node
            while value.name in taken and value not in graph.inputs and value not in outputs:
                value.name += "_"
        for node in each:
            node.name = (node.name or "").replace(prefix, "")
            for value in node.outputs:
                if value.shape is not None and value not in outputs:
                    value.shape = ir.Shape(
                        [size if isinstance(size, int) else None for size in value.shape]
                    )
    for value in constants:
        graph.initializers.pop(value.name or "")
    for value in constants:
        new = (value.name or "").replace(prefix, "")
        value.name = part.weights.get(value.name or "", new)
        while value.name in graph.initializers:
            value.name += "_"
        graph.initializers[value.name] = value


def _merged(parts: Mapping[bool, Layout], models: Mapping[bool, ir.Model]) -> ir.Model:
    """A file of two networks: what both take comes in once, and so do weights that both hold."""
    choice = parts[True].choice
    assert choice is not None
    flag = ir.Value(name=choice.flag, type=ir.TensorType(ir.DataType.BOOL))
    flag.shape = ir.Shape(choice.shape)
    inputs: dict[str, ir.Value] = {}
    for model in models.values():
        for value in model.graph.inputs:
            # The one that reads an input knows its size.
            if value.uses() or value.name not in inputs:
                inputs[value.name or ""] = ir.Value(
                    name=value.name, type=value.type, shape=value.shape
                )
    weights: dict[str, ir.Value] = {}
    ends = {v: {out.name: out for out in models[v].graph.outputs} for v in (True, False)}
    bodies = {value: _body(models[value], inputs, weights, value) for value in (True, False)}
    names = dict.fromkeys(name for part in parts.values() for name in (*part.outputs, *part.empty))
    order = list(parts[True].sizes)  # as the file has them
    names = dict.fromkeys(sorted(names, key=order.index))
    results: list[ir.Value] = []
    for name in names:
        like = next(e[name] for e in ends.values() if name in e)
        results.append(ir.Value(name=name, type=like.type, shape=like.shape))
    for value, body in bodies.items():
        for name, result in zip(names, results, strict=True):
            body.outputs.append(ends[value].get(name) or _empty(body, parts[value], name, result))
    branches = [
        ir.AttrGraph("then_branch", bodies[True]),
        ir.AttrGraph("else_branch", bodies[False]),
    ]
    node = ir.Node("", "If", [flag], branches, outputs=results, name=choice.flag)
    taken = list(inputs.values())
    taken.insert(choice.place, flag)
    first = models[True]
    graph = ir.Graph(
        taken,
        results,
        nodes=[node],
        initializers=list(weights.values()),
        opset_imports=dict(first.opset_imports) | dict(models[False].opset_imports),
        name="merged",
    )
    merged = ir.Model(graph, ir_version=first.ir_version)
    merged.metadata_props.update(first.metadata_props)
    return merged


def _body(
    model: ir.Model, inputs: Mapping[str, ir.Value], weights: dict[str, ir.Value], is_true: bool
) -> ir.Graph:
    """The nodes of a network as a branch, which reads inputs and weights from around it."""
    graph = model.graph
    for value in list(graph.inputs):
        value.replace_all_uses_with(inputs[value.name or ""])
    for value in list(graph.initializers.values()):
        name = value.name or ""
        while name in weights and not _is_same(weights[name], value):
            name += "_"
        if name not in weights:
            weights[name] = ir.Value(
                name=name, type=value.type, shape=value.shape, const_value=value.const_value
            )
        value.replace_all_uses_with(weights[name])
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return ir.Graph([], [], nodes=nodes, name="later" if is_true else "first")


def _is_same(one: ir.Value, other: ir.Value) -> bool:
    before, after = one.const_value, other.const_value
    assert before is not None
    assert after is not None
    if before.dtype != after.dtype or before.shape != after.shape:
        return False
    return before is after or before.numpy().tobytes() == after.numpy().tobytes()


def _empty(body: ir.Graph, part: Layout, name: str, result: ir.Value) -> ir.Value:
    """A constant without numbers, of the size that the other branch's result has."""
    declared = part.sizes[name]
    sizes = [
        new if isinstance(new, int) and old == was else old
        for old, was, new in zip(part.empty[name], declared, result.shape or (), strict=True)
    ]
    assert result.dtype is not None
    tensor = ir.Tensor(np.zeros(sizes, result.dtype.numpy()), name=name)
    node = ir.node("Constant", [], {"value": tensor}, name=f"{name}_empty")
    end = node.outputs[0]
    end.name, end.type, end.shape = name, result.type, ir.Shape(sizes)
    body.append(node)
    return end
