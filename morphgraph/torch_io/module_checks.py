"""A user's network before and after a resize, beside its ONNX model: equal, or what is wrong."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import onnx_ir as ir
import torch
from torch import nn

from morphgraph.arrays import Array
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import escape
from morphgraph.onnx_io.runtime import run as run_in_ort
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.tolerances import IN_PLACE, REBUILT, ROUNDING_SPREAD
from morphgraph.torch_io.module_runs import Call, Failure, Runner, largest_error
from morphgraph.torch_io.module_sizes import Attributes
from morphgraph.torch_io.module_tensors import Followed, Form, eval_form, training_form
from morphgraph.torch_io.size_search import FirstDifference, SizeSearch

_Mode = Callable[[nn.Module], AbstractContextManager[None]]
_SHOWN = 4  # names in a message


def _results(model: ir.Model, call: Call) -> list[Array]:
    single = in_single_precision(model)
    results = run_in_ort(single, call.feeds(single))
    return [results[value.name or ""] for value in model.graph.outputs]


class EvalCheck:
    """The ``eval`` forward; made before the resize.

    Attributes:
        tolerance: by which results may differ, as a share of their scale; depends on what PyTorch
            and ONNX Runtime differ by on the original.

    Raises:
        UnsupportedError: the network does not compute what the graph computes even before.
    """

    def __init__(self, runner: Runner, form: Form) -> None:
        self._before = runner
        self._after = runner.after(form.selection)
        self._form = form
        with eval_form(runner.net):
            found = runner()
        name = type(runner.net).__name__
        if isinstance(found, Failure):
            raise UnsupportedError(
                f"network {name}: does not run on these inputs before the resize: {found.words}; "
                "pass the example that it was exported with (example=)"
            )
        expected = _results(form.graph.model, runner.call)
        if len(found) != len(expected):
            raise UnsupportedError(
                f"network {name}: gives {len(found)} tensors, and the graph has {len(expected)} "
                "outputs; pass the example that it was exported with (example=)"
            )
        self._expected = expected
        error = largest_error(found, expected)
        if error > REBUILT:
            raise UnsupportedError(
                f"network {name}: differs from the graph by {error:.3g} of its scale before the "
                "resize; export it again, with the example that is given here"
            )
        self.tolerance = IN_PLACE + ROUNDING_SPREAD * error
        self._wanted = _results(form.small, self._after.call)

    def held(self, net: nn.Module) -> bool:
        """Whether another network computes what this one did before the resize."""
        return self._gives(net, self._before.call, self._expected)

    def holds(self, net: nn.Module) -> bool:
        """Whether another network computes what this one must after the resize."""
        return self._gives(net, self._after.call, self._wanted)

    def _gives(self, net: nn.Module, call: Call, wanted: Sequence[Array]) -> bool:
        with eval_form(net):
            found = Runner(net, call)()
        return not isinstance(found, Failure) and largest_error(found, wanted) <= self.tolerance

    def require(self, attributes: Attributes) -> float:
        """The error after the resize; sizes that no rule tells are found on the way.

        Raises:
            UnsupportedError: the network stores a size where it cannot be changed.
        """
        return _solve(
            self._after, self._form, eval_form, self._wanted, self.tolerance, attributes, "eval"
        )


class TrainingCheck:
    """The training forward, its norms and dropout as in ``eval``; made before the resize."""

    def __init__(self, runner: Runner, followed: Followed, selection: AxisSelection) -> None:
        self._after = runner.after(selection)
        self._followed = followed
        self._wanted: list[Array] | None = None
        self._tolerance = IN_PLACE
        with training_form(runner.net):
            found = runner()
        self._refusal = found.words if isinstance(found, Failure) else ""
        form = followed.training
        if form is None or form.traced or isinstance(found, Failure):
            return
        error = largest_error(found, _results(form.graph.model, runner.call))
        if error <= REBUILT:  # else it draws random numbers
            self._tolerance = IN_PLACE + ROUNDING_SPREAD * error
            self._wanted = _results(form.small, self._after.call)

    def require(self, attributes: Attributes) -> str:
        """What is known of the training forward after the resize.

        Raises:
            UnsupportedError: it ran before, and does not any more, or computes something else.
        """
        if self._refusal:
            return f"not run, for it did not before on these inputs: {self._refusal}"
        form = self._followed.training
        try:
            error = _solve(
                self._after,
                form,
                training_form,
                self._wanted,
                self._tolerance,
                attributes,
                "training",
            )
        except UnsupportedError as problem:
            if not self._followed.refusal:
                raise
            raise UnsupportedError(
                f"{problem}; tensors of the training forward could not be followed: "
                f"{self._followed.refusal}"
            ) from problem
        if self._wanted is None:
            return "runs"
        return f"equal to its resized ONNX (error {error:.2g} of the scale)"


def _solve(
    runner: Runner,
    form: Form | None,
    mode: _Mode,
    wanted: Sequence[Array] | None,
    tolerance: float,
    attributes: Attributes,
    forward: str,
) -> float:
    """Bring the network to run and to give what is wanted; returns the error."""

    def nowhere() -> None:
        return None

    locate: Callable[[], tuple[int, str] | None] = nowhere
    if form is not None and not form.prefix:
        single = in_single_precision(form.small)
        locate = FirstDifference(runner, single, runner.call.feeds(single), tolerance)
    search = SizeSearch(runner, wanted, tolerance, attributes, locate)
    with mode(runner.net):
        failure = search.solve()
    if failure is not None:
        raise UnsupportedError(_explained(failure, runner.net, attributes, forward))
    return search.error


def _explained(failure: Failure, net: nn.Module, attributes: Attributes, forward: str) -> str:
    """What is wrong, where, and what to do."""
    paths = {id(module): path for path, module in net.named_modules()}
    users = [m for m in failure.modules if not type(m).__module__.startswith("torch.nn.")]
    module = users[-1] if users else net
    path = paths.get(id(module), "")
    place = f"module '{escape(path)}' ({type(module).__name__})" if path else type(module).__name__
    line = f", {escape(failure.where)}" if failure.where else ""
    graph = attributes.sizes.graph
    groups = [graph.groups[index].name for index in attributes.sizes.groups(path)]
    kept = ", ".join(f"'{escape(name)}'" for name in groups[:_SHOWN]) or "its groups"
    shared = _shared(attributes, module)
    cause = (
        f"{shared}; plan these layers with one width (same=[GLOB])"
        if shared
        else "it stores a size where resize_module cannot change it, such as a number in its "
        "forward or arithmetic on one; read it from a tensor or a layer there (x.shape, "
        "self.conv.out_channels)"
    )
    return (
        f"{place}{line}: its {forward} forward does not fit the plan ({failure.words}): {cause}, "
        f"or leave {kept} as it is (exclude=){_plain_tensors(module)}; the network is as it was"
    )


def _shared(attributes: Attributes, module: nn.Module) -> str:
    """Which of a module's sizes stand in a config that others share, and would differ there."""
    found = []
    for slot in attributes.slots:
        holders = attributes.holders[slot.place]
        if slot.module is not module or len(holders) < 2:
            continue
        news = {
            size: None
            for holder in holders
            for number in holder.numbers
            for size in attributes.sizes.direct(holder.path).get(number, ())
        }
        if len(news) > 1:
            found.append(slot.label)
    names = ", ".join(f"'{escape(label)}'" for label in found)
    return f"{names}: layers of different sizes share these numbers" if found else ""


def _plain_tensors(module: nn.Module) -> str:
    """Tensors that a module keeps as mere attributes, which no plan reaches."""
    names = [
        f"self.{name}"
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.dim() and not name.startswith("_")
    ]
    return f"; or make {', '.join(names[:_SHOWN])} buffers (register_buffer)" if names else ""
