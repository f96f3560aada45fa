"""PyTorch's translation to ONNX, of what a single run has recorded.

``torch.onnx.export`` does the same by way of ``torch.export``, which takes three to six times as
long. This uses parts of it that have no public name; where a version of PyTorch lacks one, or one
refuses, an exception is raised, and the public way is to be gone.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import evaluator
from onnxscript.version_converter import _version_converter as versions
from torch import fx, nn
from torch._decomp import _core_aten_decompositions_post_autograd
from torch._export.utils import _check_valid_to_preserve, _is_cia_op, _is_preservable_cia_op
from torch._ops import OpOverload
from torch.export.decomp_utils import PRESERVED_ATEN_CIA_OPS
from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]
from torch.onnx._internal.exporter import _core, _flags, _ir_passes
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import OnnxDecompMeta, ONNXRegistry
from torch.onnx._internal.exporter._tensors import SymbolicTensor
from torch.onnx._internal.exporter._torchlib import _torchlib_registry, ops as _own_ops  # noqa: F401
from torch.onnx._internal.fx.passes import type_promotion

from morphgraph.onnx_io import subgraphs
from morphgraph.torch_io.arguments import Call
from morphgraph.torch_io.capture import Captured, capture
from morphgraph.torch_io.constants import Known, mark_known, unmark_known
from morphgraph.torch_io.repeats import Names, Repeating
from morphgraph.torch_io.torchlib import default_registry

aten = torch.ops.aten
_translated: Callable[..., Any] = _core._exported_program_to_onnx_program  # noqa: SLF001


@_flags.set_onnx_exporting_flag
def translate_quickly(net: nn.Module, call: Call, names: list[str], opset: int) -> ir.Model:
    """The network in ONNX, as ``torch.onnx.export`` writes it without optimizations.

    Args:
        net: in inference mode.
        call: the arguments of its forward.
        names: of the inputs, one per tensor.
        opset: the version of ONNX's operators.

    Raises:
        HasBagsError: there is an ``embedding_bag``, which is to become something else first.
        Exception: anything, where this is not known to give the same.
    """
    version = max(opset, TORCHLIB_OPSET)
    captured = capture(net, call, _Registry(version).is_kept, _Decompositions())
    _promote(captured.graph_module)
    model = _raised(_written(captured, version), opset)
    _ir_passes.rename_inputs(model, names)
    return model


def _written(captured: Captured, version: int) -> ir.Model:
    """The nodes of what was recorded, but for those that lead to constants."""
    graph = captured.graph_module.graph
    are_known = mark_known(graph, captured.constants_by_node())
    model: ir.Model = _translated(captured, registry=_Registry(version)).model
    if are_known and model.functions:
        # What becomes of functions gets names behind all others, which are counted differently.
        unmark_known(graph)
        model = _translated(captured, registry=_Registry(version)).model
    return model


def _raised(model: ir.Model, opset: int) -> ir.Model:
    """The model in another version of ONNX's operators, as ``convert_version`` gives it.

    That visits every node once for every version in between. Few operators ever became others: all
    other nodes are said to be of the new version before, and where none of these is there, that is
    all.
    """
    if model.functions or not versions.version_supported(model, opset):
        return _converted(model, opset)
    nodes = [node for node in model.graph.all_nodes() if not node.domain]
    changing = {node for node in nodes if _becomes_another(node, opset)}
    for node in nodes:
        # What stands in subgraphs is visited by way of the node that has them.
        if node not in changing and not (changing and subgraphs(node)):
            node.version = opset
    if changing:
        return _converted(model, opset)
    model.opset_imports[""] = opset
    common.RemoveUnusedNodesPass()(model)
    return model


def _converted(model: ir.Model, opset: int) -> ir.Model:
    converted: ir.Model = onnxscript_apis.convert_version(model, opset)
    return converted


def _becomes_another(node: ir.Node, opset: int) -> bool:
    """Whether a node may have to be changed on the way from its own version to another."""
    own = node.version
    if own is None or own > opset:
        return True
    adapters = (versions.registry.lookup_adapters("", node.op_type, v) for v in range(own, opset))
    return any(adapter is not None for adapter in adapters)


class _Decompositions:
    """What operators consist of, as the exporter takes them apart.

    ``torch.export.default_decompositions`` lists all composite operators first, which takes longer
    than most exports need for them.
    """

    def __init__(self) -> None:
        self._core = _core_aten_decompositions_post_autograd()

    def __call__(self, target: OpOverload) -> Callable[..., Any] | None:
        """The decomposition of an operator, if there is one."""
        if target in _OWN:
            return _OWN[target]
        is_composite = target not in self._core and target not in PRESERVED_ATEN_CIA_OPS
        if is_composite and _is_preservable_cia_op(target):
            return target.decompose
        return torch._decomp.decomposition_table.get(target)  # noqa: SLF001


def _inferred_batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    if training:
        raise NotImplementedError("a batch normalization computes statistics of the batch")
    operands = (x, weight, bias, mean, variance)
    infer = aten._native_batch_norm_legit_no_training.default  # noqa: SLF001
    return infer(*operands, momentum, eps)


def _composite_batch_norm(*operands: Any) -> Any:
    """By one step what PyTorch takes apart by several; the last operand is about cuDNN alone."""
    return _inferred_batch_norm(*operands[:-1])[0]


_OWN: dict[OpOverload, Callable[..., Any]] = {
    aten.native_batch_norm.default: _inferred_batch_norm,
    aten.batch_norm.default: _composite_batch_norm,
}


class _Registry(ONNXRegistry):
    """Translations, looked up when they are needed: to prepare them all takes half a second."""

    def __init__(self, opset: int) -> None:
        super().__init__()
        self._opset_version = opset
        self._found: dict[str, list[OnnxDecompMeta]] = {}
        self._own: dict[str, list[OnnxDecompMeta]] = defaultdict(list)
        self._names = Names()
        for meta in _torchlib_registry.get_torchlib_ops():
            if meta.opset_introduced <= opset:
                self._own[_name(meta.fx_target)].append(meta)

    def get_decomps(self, target: Any) -> list[OnnxDecompMeta]:
        """The translations of an operator, or of a function of Python."""
        if isinstance(target, Known):
            write = partial(self._write_known, target)
            return [_meta(write, target.func, is_complex=False)]
        name = _name(target)
        if name not in self._found:
            self._found[name] = self._newest(target)
        return self._found[name]

    def _write_known(self, known: Known, *args: Any, **kwargs: Any) -> SymbolicTensor:
        """A constant instead of the operator that computes it, or nothing; who reads it."""
        translation = next(m for m in self.get_decomps(known.func) if not m.is_complex)
        assert isinstance(translation.onnx_function, Repeating)
        translation.onnx_function.leave_out(args, kwargs)
        recorder: Any = evaluator.default()
        result = SymbolicTensor(recorder.opset)
        if known.tensor is not None:
            value = ir.AttrTensor("value", ir.Tensor(known.tensor.numpy()))
            version = recorder.opset.version
            recorder.nodes.append(
                ir.Node("", "Constant", [], [value], outputs=[result], version=version)
            )
        return result

    def is_kept(self, target: OpOverload) -> bool:
        """Whether ``torch.export`` leaves an operator as it is.

        It takes apart composite ones whose result may share memory with an operand.
        """
        if target is aten.native_batch_norm.default:
            return False
        is_whole = not _is_cia_op(target) or _check_valid_to_preserve(target)
        return is_whole and self.is_registered(target)

    def _newest(self, target: Any) -> list[OnnxDecompMeta]:
        name = _name(target)
        found = list(self._own.get(name, ()))
        if name in default_registry:
            shared = default_registry[name]
            for function in (*shared.overloads, *shared.complex):
                is_complex = function in shared.complex
                found.append(_meta(function, target, is_complex=is_complex))
        newest = max((meta.opset_introduced for meta in found), default=0)
        return [
            _meta(Repeating(meta.onnx_function, self._names), target, is_complex=meta.is_complex)
            for meta in found
            if meta.opset_introduced == newest
        ]


def _meta(function: Callable[..., Any], target: Any, *, is_complex: bool) -> OnnxDecompMeta:
    """A translation; of its signature, which takes long to read, nothing is used."""
    return OnnxDecompMeta(
        function, target, None, is_complex=is_complex, skip_signature_inference=True
    )


def _name(target: Any) -> str:
    """What torchlib calls an operator, or a function of Python (``_operator::getitem``)."""
    if isinstance(target, OpOverload):
        return str(target.name())  # type: ignore[no-untyped-call]
    return f"{target.__module__}::{target.__name__}"


def _promote(module: fx.GraphModule) -> None:
    """Insert the casts that bring operands of an operator to one type."""
    table = type_promotion.TypePromotionTable()
    promoting = {node for node in module.graph.nodes if _promotes(node, table)}
    if promoting:
        promotion = type_promotion.InsertTypePromotion(module, table)
        promotion.interpreter = _Promotion(module, table, promoting)
        promotion.run()


def _promotes(node: fx.Node, table: type_promotion.TypePromotionTable) -> bool:
    """Whether operands of an operator may have to be brought to one type."""
    if type_promotion.get_type_promotion_rule(node, table) is None:
        return False
    types = {
        value.dtype
        for source in (node, *node.all_input_nodes)
        if isinstance(value := source.meta["val"], torch.Tensor)
    }
    if len(types) != 1 or not types.pop().is_floating_point:
        return True
    # Numbers become tensors of their own, and get the names that they have as such.
    return any(isinstance(leaf, int | float | complex) for leaf in node.args)


class _Promotion(type_promotion._TypePromotionInterpreter):  # noqa: SLF001
    """Runs what is promoted; of all else the results are known."""

    def __init__(
        self,
        module: fx.GraphModule,
        table: type_promotion.TypePromotionTable,
        promoting: Collection[fx.Node],
    ) -> None:
        super().__init__(module, table)
        self._promoting = promoting

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node."""
        if n.op == "call_function" and n not in self._promoting:
            return n.meta["val"]
        return super().run_node(n)
