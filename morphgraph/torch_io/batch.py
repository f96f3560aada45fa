"""Free the batch size of a network that was exported with a fixed one.

An export with a batch of 1 writes that 1 into every shape: ``reshape(x, (1, 512))``. To find which
axis of which value is the batch, the network runs on shapes alone (the meta device), at the batch
of the export and at three times as much: the axis that grows carries the batch. A reshape with
numbers in it cannot grow by itself. It keeps samples apart exactly if the positions that come
before the batch in row-major order stay before it, so that the batch can stand in the new shape:

    (1, 3, 49, 96) -> (1, 49, 288)     nothing before it: axis 0, (-1, 49, 288)
    (49, 1, 512)   -> (49, 8, 64)      49 before it: axis 1 with (49, -1, 64), or axis 0

Where that leaves a choice, a depth-first search takes the first axis that no later operation
refuses; an operation refuses where it mixes samples or where shapes do not fit. A network that was
found by such a choice is then run on random inputs, whose samples must not influence each other.
Otherwise it stays as it was, and the reason is returned.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from morphgraph.arrays import Shape
from morphgraph.errors import MorphError
from morphgraph.tolerances import REBUILT
from morphgraph.torch_io.functions import fused, stepwise

FREE = "free"
"""What is said of a network that takes any batch."""

_GROWTH = 3  # times the batch of the export
_MOST_CHOICES = 1000  # tried before giving up
_BATCH_FIRST = (_ConvNd, _NormBase, _MaxPoolNd, _AvgPoolNd)
_POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Dropout, nn.Identity),
)
_RECURRENT = (fused, stepwise)
_COMPETING = (torch.softmax, torch.log_softmax, torch.argmax)


class _FixedError(MorphError):
    """The batch cannot be freed; the message says why."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Where a value carries the batch: on ``axis``, behind ``outer`` other positions there."""

    axis: int
    outer: int = 1


def free_batch(net: fx.GraphModule, examples: list[torch.Tensor], dynamic: bool) -> str:
    """Let a network take any batch size; returns ``"free"`` or why it does not.

    Args:
        net: in ``eval`` mode; its graph is edited where a shape holds the batch.
        examples: one tensor per input, of the exported shape; only shape and type are read.
        dynamic: the model itself leaves the batch open, so that shapes that run are right.
    """
    sizes = {tuple(example.shape[:1]) for example in examples}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        return "the inputs have no leading axis of one size"
    (batch,) = sizes.pop()
    freed = _Freed(net, batch, dynamic)
    try:
        freed.run(examples)
    except _FixedError as reason:
        return str(reason)
    if not (freed.edits or freed.guessed):
        return FREE
    original = deepcopy(net.graph)
    noise = _noise(examples, 1) if freed.single else []
    before = _answers(net, noise) if freed.single else []
    freed.apply()
    if freed.guessed and not _keeps_samples_apart(net, examples, freed.output_axes()):
        net.graph = original
        return "samples influence each other"
    if freed.single and not _agree(before, _answers(net, noise)):
        net.graph = original
        return "constants are counted once for every sample"
    return FREE


def _noise(examples: list[torch.Tensor], times: int) -> list[torch.Tensor]:
    """Random inputs, so many times the batch of the export."""
    return [
        torch.randn(times * len(e), *e.shape[1:], dtype=e.dtype)
        if e.is_floating_point()
        else torch.randint(0, 2, (times * len(e), *e.shape[1:])).to(e.dtype)
        for e in examples
    ]


def _answers(net: fx.GraphModule, noise: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return _tensors(net(*noise))


def _agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= REBUILT * one.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def _keeps_samples_apart(
    net: fx.GraphModule, examples: list[torch.Tensor], axes: list[int]
) -> bool:
    """Whether a batch gives what its two halves give, on random inputs."""
    noise = _noise(examples, 2)
    with torch.no_grad():
        if all(x.is_floating_point() for x in noise) and _undefined_apart(net, noise, axes):
            return True
        whole = _tensors(net(*noise))
        halves = [_tensors(net(*(x.chunk(2)[k] for x in noise))) for k in (0, 1)]
    joined = [torch.cat(parts, axis) for *parts, axis in zip(*halves, axes, strict=True)]
    return _agree(whole, joined)


def _undefined_apart(net: fx.GraphModule, noise: list[torch.Tensor], axes: list[int]) -> bool:
    """Whether numbers that are undefined in the second half stay there, and reach all of it.

    One run in place of three. A NaN passes through weights that are zero, so that this tells more
    than the values; a network that drops it (an argmax, a comparison) is judged by these.
    """
    halves = [x.chunk(2) for x in noise]
    found = _tensors(
        net(*(torch.cat([one, torch.full_like(other, torch.nan)]) for one, other in halves))
    )
    parts = [tensor.isnan().chunk(2, axis) for tensor, axis in zip(found, axes, strict=True)]
    return all(len(part) == 2 and not part[0].any() and part[1].all() for part in parts)


def _tensors(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [tensor.double() for tensor in ([outputs] if torch.is_tensor(outputs) else outputs)]


class _OnShapes(fx.Interpreter):
    """Runs a network without memory or arithmetic: everything is on the meta device."""

    def fetch_attr(self, target: str) -> Any:
        attribute = super().fetch_attr(target)
        return attribute.to("meta") if isinstance(attribute, torch.Tensor) else attribute

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = super().fetch_attr(target)
        assert isinstance(module, nn.Module)
        result = _known_result(module, *args)
        if result is not None:
            return result
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        shapes = {name: tensor.to("meta") for name, tensor in state.items()}
        return torch.func.functional_call(module, shapes, args, kwargs)


def _known_result(module: nn.Module, x: Any, *others: Any) -> torch.Tensor | None:
    """What a module gives on shapes, where that is clear without running it, which takes longer."""
    if others or not isinstance(x, torch.Tensor):
        return None
    match module:
        case nn.LayerNorm() if x.shape[-len(module.normalized_shape) :] == module.normalized_shape:
            return x
        case nn.Linear() if x.ndim and x.shape[-1] == module.in_features:
            return x.new_empty((*x.shape[:-1], module.out_features))
        case _NormBase() if x.ndim > 1 and x.shape[1] == module.num_features:
            return x
    return x if isinstance(module, _POINTWISE) else None


class _Freed:
    """One run at the batch of the export, one at a larger batch, and the edits that it takes."""

    def __init__(self, net: fx.GraphModule, batch: int, dynamic: bool) -> None:
        self.net, self.batch, self.dynamic = net, batch, dynamic
        self.machine = _OnShapes(net, garbage_collect_values=False)
        self.old: dict[fx.Node, Shape] = {}
        self.carried: dict[fx.Node, _Batch] = {}
        self.reshapes: dict[fx.Node, Shape] = {}
        self.repeats: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.single: dict[fx.Node, Shape] = {}  # expansions of constants, and for one sample
        self.guessed = False

    @property
    def edits(self) -> bool:
        """Whether the graph has to change."""
        return bool(self.reshapes or self.repeats or self.single)

    @property
    def env(self) -> dict[fx.Node, Any]:
        return self.machine.env

    def run(self, examples: list[torch.Tensor]) -> None:
        """Find the edits.

        Raises:
            _FixedError: there are none that keep samples apart.
        """
        nodes = list(self.net.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        with torch.no_grad(), torch.device("meta"):
            for node, example in zip(inputs, examples, strict=True):
                self.env[node] = example
            for node in nodes:
                if node.op not in ("placeholder", "output"):
                    self.env[node] = self.machine.run_node(node)
            self.old = {
                n: tuple(v.shape) for n, v in self.env.items() if isinstance(v, torch.Tensor)
            }
            for node, example in zip(inputs, examples, strict=True):
                self.env[node] = torch.empty(
                    (_GROWTH * self.batch, *example.shape[1:]), dtype=example.dtype
                )
                self.carried[node] = _Batch(0)
            self._search([n for n in nodes if n.op not in ("placeholder", "output")])

    def _search(self, nodes: list[fx.Node]) -> None:
        """Run node by node; where one refuses, go back to the last choice and take the next."""
        # The stack of the search: per reshape with a choice, what has not been tried there. Going
        # back needs no undoing: values, batches and edits of later nodes are written again.
        choices: list[tuple[int, Iterator[_Batch]]] = []
        tried, k, first_failure = 0, 0, None
        while k < len(nodes):
            node = nodes[k]
            try:
                options = self._options(node)
                if options is not None:
                    choices.append((k, options))
                    self._take(node, next(options))
                else:
                    self._step(node)
                k += 1
            except _FixedError as failure:
                first_failure = first_failure or failure
                self.guessed = True
                k = self._other_choice(choices, nodes, first_failure)
                tried += 1
                if tried > _MOST_CHOICES:
                    raise first_failure from None

    def _other_choice(
        self,
        choices: list[tuple[int, Iterator[_Batch]]],
        nodes: list[fx.Node],
        failure: _FixedError,
    ) -> int:
        while choices:
            k, options = choices[-1]
            option = next(options, None)
            if option is not None:
                self._take(nodes[k], option)
                return k + 1
            choices.pop()
        raise failure

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.carried]

    def _options(self, node: fx.Node) -> Iterator[_Batch] | None:
        """Where the batch may stand behind a reshape; ``None`` where there is no choice."""
        if node.target not in ("reshape", "flatten") or not self._sources(node):
            return None
        (source, *_) = self._sources(node)
        carried, old_in, old_out = self.carried[source], self.old[source], self.old[node]
        # Positions that come before the batch in row-major order, whatever axes they are spread on.
        ahead = prod(old_in[: carried.axis]) * carried.outer
        places = _landings(ahead, carried.axis, old_in, old_out, self.batch)
        # Where the shape is computed from sizes, running it tells which of the places it is.
        if self.dynamic or node.target == "flatten":
            try:
                value = self.machine.run_node(node)
            except RuntimeError:
                value = None
            if value is not None:
                axis = _grown_axis(node, old_out, tuple(value.shape))
                places = [place for place in places if place.axis == axis]
        if not places:
            raise _FixedError(f"{node.name} mixes samples")
        self.guessed |= ahead > 1 and len(places) > 1
        return iter(places)

    def _take(self, node: fx.Node, place: _Batch) -> None:
        """Reshape so that the batch stands at a place."""
        (source, *_) = self._sources(node)
        shape = tuple(-1 if k == place.axis else size for k, size in enumerate(self.old[node]))
        self.env[node] = self.env[source].reshape(shape)
        self.carried[node] = place
        if node.target == "reshape" and not self.dynamic:
            self.reshapes[node] = shape

    def _step(self, node: fx.Node) -> None:
        """Run a node; where the batch goes shows in the shape of the result."""
        sources = self._sources(node)
        self.carried.pop(node, None)
        self.single.pop(node, None)
        if not sources and self._for_one_sample(node):
            return
        try:
            if node.target is torch.cat and sources:
                result: Any = self._concatenate(node, sources)
            else:
                result = self.machine.run_node(node)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise _FixedError(f"{node.name}: {str(error).strip().splitlines()[0]}") from error
        self.env[node] = result
        if not sources or node in self.carried:
            return
        places = {self.carried[source] for source in sources}
        self._refuse_mixing(node, sources)
        # A sum of (batch, 49) and (49, batch) positions would add different samples.
        outers = {place.outer for place in places}
        if len(outers) != 1:
            raise _FixedError(f"{node.name} combines values that order the samples differently")
        if isinstance(result, torch.Tensor):
            axis = _grown_axis(node, self.old[node], tuple(result.shape))
            self.carried[node] = _Batch(axis, outers.pop())
        else:
            self.carried[node] = places.pop()

    def _for_one_sample(self, node: fx.Node) -> bool:
        """Leave out the copies of a constant for every sample, which stand in front.

        What combines it with samples broadcasts it, or repeats it for as many as there are.
        """
        if node.target != "expand" or self.batch == 1 or len(node.args) != 2:
            return False
        constant, sizes = node.args
        value = self.env.get(constant) if isinstance(constant, fx.Node) else None
        if not isinstance(sizes, tuple) or not isinstance(value, torch.Tensor):
            return False
        if not all(isinstance(size, int) for size in sizes) or sizes[0] != self.batch:
            return False
        if value.ndim == len(sizes) and value.shape[0] != 1:
            return False
        self.single[node] = (1, *sizes[1:])
        self.env[node] = value.expand(self.single[node])
        self.guessed = True
        return True

    def _refuse_mixing(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Refuse operations that have a fixed axis for samples, or compute along the batch."""
        place, rank = self.carried[sources[0]], len(self.old.get(sources[0], ()))
        mixes = False
        if node.op == "call_module":
            module = self.net.get_submodule(str(node.target))
            mixes = isinstance(module, _BATCH_FIRST) and place.axis != 0
            mixes |= isinstance(module, nn.RNNBase) and place.axis != 1
        elif node.target in _RECURRENT:
            mixes = place.axis != 1
        elif node.target in _COMPETING or node.target == "split":
            axis = node.args[2 if node.target == "split" else 1]
            mixes = isinstance(axis, int) and axis % rank == place.axis
        if mixes:
            raise _FixedError(f"{node.name} mixes samples")

    def _concatenate(self, node: fx.Node, sources: list[fx.Node]) -> torch.Tensor:
        """Constants that stand beside samples, such as class tokens, are repeated for each."""
        operands, axis = _joined(node)
        axis %= len(self.old[node])
        place = self.carried[sources[0]]
        if place.axis == axis:
            # Chunks of samples joined along the batch: each must be a whole batch.
            if any(o not in self.carried or self.old[o][axis] != self.batch for o in operands):
                raise _FixedError(f"{node.name} joins along the batch")
            self.carried[node] = _Batch(axis, len(operands))
        values = []
        for operand in operands:
            value = self.env[operand]
            self.repeats.pop((node, operand), None)
            if operand not in self.carried:
                if value.shape[place.axis] != 1:
                    raise _FixedError(f"{node.name} joins samples with as many constants")
                self.repeats[node, operand] = sources[0]
                sizes = [-1] * value.ndim
                sizes[place.axis] = self.env[sources[0]].shape[place.axis]
                value = value.expand(sizes)
            values.append(value)
        return torch.cat(values, axis)

    def output_axes(self) -> list[int]:
        """The batch axis of every output."""
        (output,) = (node for node in self.net.graph.nodes if node.op == "output")
        return [self.carried[node].axis for node in output.all_input_nodes]

    def apply(self) -> None:
        """Write the edits into the graph."""
        graph = self.net.graph
        for node, shape in (self.reshapes | self.single).items():
            node.args = (node.args[0], shape)
        for (node, operand), source in self.repeats.items():
            axis = self.carried[source].axis
            with graph.inserting_before(node):
                sizes: list[int | fx.Node] = [-1] * len(self.old[operand])
                sizes[axis] = graph.call_method("size", (source, axis))
                repeated = graph.call_method("expand", (operand, *sizes))
            operands, dim = _joined(node)
            node.args = (tuple(repeated if o is operand else o for o in operands), dim)
        self.net.recompile()


def _joined(node: fx.Node) -> tuple[list[fx.Node], int]:
    """The operands of ``torch.cat`` and the axis it joins."""
    operands, axis = node.args
    assert isinstance(operands, tuple)
    assert isinstance(axis, int)
    return [operand for operand in operands if isinstance(operand, fx.Node)], axis


def _grown_axis(n: fx.Node, old: Shape, new: Shape) -> int:
    """The one axis that grew by as much as the batch."""
    if len(old) != len(new):
        raise _FixedError(f"{n.name} has {len(new)} axes instead of {len(old)} at a larger batch")
    grown = [axis for axis, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    if len(grown) != 1:
        what = "mixes or picks samples" if not grown else "carries the batch on two axes"
        raise _FixedError(f"{n.name} {what}")
    (axis,) = grown
    if new[axis] != old[axis] * _GROWTH:
        raise _FixedError(f"{n.name}: axis {axis} does not grow as the batch does")
    return axis


def _landings(ahead: int, axis: int, old_in: Shape, old_out: Shape, batch: int) -> list[_Batch]:
    """Where the batch may stand in a new shape, ``ahead`` positions coming before it.

    Best first. The batch is the head of an axis if the axes before it hold exactly the ``ahead``
    positions. Several axes can, where some have size 1: the one at the same distance from the last
    larger axis as before comes first. After these come axes that the batch shares with positions
    that were merged with it: it stands behind ``outer`` of them.

    >>> _landings(49, 1, (49, 1, 512), (49, 512), 1)
    [_Batch(axis=1, outer=1), _Batch(axis=0, outer=49)]
    """
    heads = [
        k for k, s in enumerate(old_out) if prod(old_out[:k]) == ahead and s and s % batch == 0
    ]
    if heads:
        first = next(k for k in range(len(old_in)) if prod(old_in[:k]) == prod(old_in[:axis]))
        best = heads[min(axis - first, len(heads) - 1)]
        heads.sort(key=lambda k: k != best)
    inside = [
        _Batch(k, outer)
        for k, size in enumerate(old_out)
        for outer, rest in [divmod(ahead, prod(old_out[:k]))]
        if not rest and outer > 1 and size % (outer * batch) == 0
    ]
    return [_Batch(k) for k in heads] + inside
