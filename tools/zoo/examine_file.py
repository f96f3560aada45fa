"""What morphgraph makes of an ONNX file of others."""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from decoders import DecoderEntry
from entry import Entry
from examine import coarsest, cut, describe_groups
from file_findings import DecoderFindings, FileFindings
from findings import BUDGET
from others import FileEntry
from prepare import paths, worst_error

import morphgraph as mg
from morphgraph.errors import MorphError, VerificationError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import DEFAULT_KEY
from morphgraph.onnx_io.runtime import session
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.passes.rewrite.mask import mask
from morphgraph.passes.rewrite.resize import resize

T = TypeVar("T")
#: Of a sequence of tensors there is a list in place of an array.
Arrays = list[Any]
#: Inputs are moved by this share: the rounding of single precision; and where the file quantizes,
#: an eighth of a step of 8 bits, so that some round the other way; two steps of half precision,
#: which would round all of less away.
MOVED, MOVED_COARSE = 1e-6, 1e-3
_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class FileExamination:
    """Puts one file through every check; ``found`` is up to date after every stage.

    Args:
        found: what is to be filled.
        path: of the file.
        feeds: its inputs.
        note: called after every stage.
        expected: what the file computes, where that is known; else ONNX Runtime is asked.
        lowest: whether to plan at the lowest reachable, not at the zoo's budget.
        keeps_open: whether sizes stay open where the file leaves them open.
        fixed: inputs that are fixed to what ``feeds`` give for them.
    """

    def __init__(
        self,
        found: FileFindings,
        path: Path,
        feeds: Mapping[str, Any],
        note: Callable[[FileFindings], None],
        expected: Arrays | None = None,
        lowest: bool = False,
        keeps_open: bool = False,
        fixed: Sequence[str] = (),
    ) -> None:
        self.found, self.path, self.given = found, path, feeds
        self.fixed = {name: feeds[name] for name in fixed}
        self.feeds = {name: array for name, array in feeds.items() if name not in fixed}
        self.note, self.expected, self.to_lowest = note, expected, lowest
        self.keeps_open = keeps_open

    def run(self) -> FileFindings:
        """Everything that can be found out; a stage that fails ends those that need it."""
        found = self.found
        self._describe_file()
        try:
            run_file(self.path, self.given)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no base class
            found.not_run = first_line(error)
        shapes = {n: a.shape for n, a in self.feeds.items() if isinstance(a, np.ndarray)}
        shapes = {} if self.keeps_open else shapes
        graph = self.attempt("lift", lambda: mg.lift(mg.load(self.path, shapes), fixed=self.fixed))
        if graph is None:
            return found
        if self.expected is not None or not found.not_run:
            self._compare_lifted(graph)
        macs = self.attempt("cost", lambda: mg.cost(graph, "macs"))
        if macs is None:
            return found
        found.macs = macs.total
        describe_groups(self.found, graph)
        if not found.nothing_to_shrink:
            self._resize(graph)
        return found

    def attempt(self, stage: str, action: Callable[[], T]) -> T | None:
        """Do it; an error becomes a finding."""
        try:
            with self._clock(stage):
                return action()
        except Exception as error:  # noqa: BLE001 - whatever fails is what is looked for
            self.found.crashes[stage] = first_line(error)
            return None
        finally:
            self.note(self.found)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.found.seconds[stage] = round(time.perf_counter() - start, 3)

    def _describe_file(self) -> None:
        proto = onnx.load(self.path, load_external_data=False)
        opset = max((o.version for o in proto.opset_import if not o.domain), default=0)
        words = [proto.producer_name or "unnamed", proto.producer_version.split("+")[0]]
        self.found.producer = " ".join(word for word in words if word) + f", opset {opset}"
        self.found.bytes = [self.path.stat().st_size]
        self.found.nodes = len(proto.graph.node)
        try:
            onnx.checker.check_model(self.path, full_check=True)
            self.valid = True
        except Exception:  # noqa: BLE001 - several kinds; ONNX Runtime writes what it refuses
            self.valid = False

    def _compare_lifted(self, graph: ChannelGraph) -> None:
        """The canonical model beside the file as it came, or beside what is expected of that."""
        expected = self.expected
        if expected is None:
            at = not self.fixed
            expected = self.attempt(
                "as it came", lambda: _run(_as_it_came(self.path), self.given, at=at)
            )
        if expected and all(_is_float(array) and np.isnan(array).all() for array in expected):
            self.found.not_run = "it computes NaN"
        # Stored outputs are those of the file's own precision.
        run = _run if self.expected is None else _run_as_it_is
        results = self.attempt("lifted", lambda: run(graph.model, self._with_defaults(graph)))
        if results is None and self.found.not_run:  # nor does the file run: no fault of the lift
            del self.found.crashes["lifted"]
        if results is None or expected is None:
            return
        pairs = [
            (a, b)
            for a, b in zip(results, expected, strict=True)
            if isinstance(b, np.ndarray) and b.dtype.kind not in "OSU"
        ]
        if pairs:
            self.found.unexpected = error_of([a for a, _ in pairs], [b for _, b in pairs])

    def _with_defaults(self, graph: ChannelGraph) -> dict[str, Any]:
        """The inputs, and those that have a value of their own."""
        defaults = {
            value.name or "": value.meta[DEFAULT_KEY].numpy()
            for value in graph.model.graph.inputs
            if DEFAULT_KEY in value.meta
        }
        return defaults | dict(self.feeds)

    def _resize(self, graph: ChannelGraph) -> None:
        found = self.found
        found.target = found.lowest if self.to_lowest else max(BUDGET, found.lowest)
        bound = 2 * found.macs * found.target
        plan = self.attempt(
            "plan", lambda: mg.plan(graph, {"flops": bound}, score="random", seed=0)
        )
        if plan is None:
            return
        widths = plan.widths(graph)
        found.ratio = mg.cost(graph, "macs").at(widths) / found.macs
        found.coarsest = coarsest(graph, plan)
        keep = plan.keep_channels(graph)
        small = self.attempt("resize", lambda: resize(graph, keep))
        if small is None:
            return
        feeds = cut(graph, keep, self.feeds)
        self.attempt("save", lambda: self._save(small, feeds))
        expected = self.attempt("mask", lambda: self._noise(mask(graph, keep)))
        results = self.attempt("compare", lambda: _run(small, feeds))
        if expected is not None and results is not None:
            names = [value.name or "" for value in graph.model.graph.outputs]
            stays = cut(graph, keep, dict(zip(names, expected, strict=True)))
            found.error = error_of(results, [stays[name] for name in names])
            original = self.attempt("original", lambda: _run(graph.model, self.feeds))
            found.felt = float("nan") if original is None else error_of(original, expected)
        self.attempt("apply", lambda: self._apply(graph, plan))

    def _apply(self, graph: ChannelGraph, plan: mg.Plan) -> None:
        """What users call; does it hand the result out?"""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                mg.apply(graph, plan)
                self.found.accepted = True
            except VerificationError:
                self.found.accepted = False

    def _save(self, small: ir.Model, feeds: Mapping[str, Any]) -> None:
        """Write it as users do, look at the file, and run that."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "small.onnx"
            mg.save(small, target)
            if self.valid:
                onnx.checker.check_model(target, full_check=True)
            self.found.bytes.append(sum(part.stat().st_size for part in Path(folder).iterdir()))
            self.found.allowed = _allowed(self.path, target)
            if not self.found.not_run:
                run_file(target, feeds)

    def _noise(self, masked: ir.Model) -> Arrays:
        """What the masked original computes; and how far rounding moves that."""
        expected = _run(masked, self.feeds)
        generator = np.random.default_rng(1)
        others = [_run(masked, self.feeds, optimize=True)]
        is_coarse = any(
            "Quantize" in node.op_type or any(value.dtype in _HALF for value in node.outputs)
            for node in masked.graph.all_nodes()
        )
        share = MOVED_COARSE if is_coarse else MOVED
        for _ in range(2):
            moved = {n: _moved(a, share, generator) for n, a in self.feeds.items()}
            others.append(_run(masked, moved))
        self.found.noise = max(error_of(other, expected) for other in others)
        return expected


def first_line(error: Exception) -> str:
    """Of its words, after its kind where that is not morphgraph's own."""
    words = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, MorphError) else f"{type(error).__name__}: "
    return kind + words[0][:400]


def error_of(found: Arrays, expected: Arrays) -> float:
    """The worst error of any output; NaN where NaN is expected is none."""
    if [a.shape for a in found] != [a.shape for a in expected]:
        return float("inf")
    same = [np.isnan(a) & np.isnan(b) for a, b in zip(found, expected, strict=True)]
    return worst_error(
        [np.where(s, 0, a) for s, a in zip(same, found, strict=True)],
        [np.where(s, 0, b) for s, b in zip(same, expected, strict=True)],
    )


def _is_float(array: object) -> bool:
    """Not so: whole numbers, strings, sequences of arrays."""
    return isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating)


def _moved(
    array: np.ndarray[Any, Any], share: float, generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    if not _is_float(array):
        return array
    moved = array * (1 + share * generator.standard_normal(array.shape))
    return np.asarray(moved, array.dtype)


def _allowed(before: Path, after: Path) -> float:
    """The share of a file that stays: of every tensor what was kept, and what is no tensor."""
    old, new = (_tensors(ir.load(path)) for path in (before, after))
    shares = {name: new[name][0] / max(old[name][0], 1) for name in old.keys() & new.keys()}
    gone = sum(old[name][1] * (1 - min(share, 1.0)) for name, share in shares.items())
    return 1 - gone / before.stat().st_size


def _tensors(model: ir.Model) -> dict[str, tuple[int, int]]:
    """Elements and bytes of every stored tensor, by name."""
    stored = {
        name: value.const_value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
    }
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and "value" in node.attributes:
            stored[node.outputs[0].name or ""] = node.attributes["value"].as_tensor()
    return {name: (tensor.size, tensor.nbytes) for name, tensor in stored.items() if tensor}


def _run(
    model: ir.Model, feeds: Mapping[str, Any], optimize: bool = False, at: bool = True
) -> Arrays:
    """The results in single precision; slicing does not round.

    Built at the shapes that are fed; or not, where of the branches of an If one alone takes them.
    """
    single = in_single_precision(model)
    wide = {
        name: array.astype(np.float32) if _is_float(array) else array
        for name, array in feeds.items()
    }
    shapes = _shapes(wide) if at else None
    return list(session(single, optimize=optimize, shapes=shapes).run(None, wide))


def _run_as_it_is(model: ir.Model, feeds: Mapping[str, Any]) -> Arrays:
    return list(session(model, optimize=False, shapes=_shapes(feeds)).run(None, dict(feeds)))


def _shapes(feeds: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Of all inputs; those that the model states where one is no array."""
    arrays = {name: each for name, each in feeds.items() if isinstance(each, np.ndarray)}
    return {n: a.shape for n, a in arrays.items()} if len(arrays) == len(feeds) else None


def _as_it_came(path: Path) -> ir.Model:
    """The file by nobody's passes; converters to float16 leave nodes out of order."""
    model = ir.load(path)
    model.graph.sort()
    return model


def run_file(path: Path, feeds: Mapping[str, Any]) -> Arrays:
    """The results of a file as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    running = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(running.run(None, dict(feeds)))


def examine_file(entry: FileEntry, note: Callable[[FileFindings], None]) -> FileFindings:
    """The row of an entry whose file is prepared."""
    at_model, at_arrays, _ = paths(entry)
    with np.load(at_arrays, allow_pickle=False) as arrays:
        feeds = {name: arrays[name] for name in arrays}
    keeps_open = isinstance(entry, DecoderEntry)
    return FileExamination(
        blank(entry), at_model, feeds, note, keeps_open=keeps_open, fixed=entry.fixed
    ).run()


def blank(entry: Entry) -> FileFindings:
    """A row that holds only what the entry says."""
    kind = DecoderFindings if isinstance(entry, DecoderEntry) else FileFindings
    return kind(entry.name, entry.family, entry.options["source"], entry.options["treatment"])
