"""Where the tensors of a model live in a torch module, and what reads them there."""

from collections.abc import Collection, Sequence

import onnx_ir as ir
from torch import fx, nn

from morphgraph.torch_io.modules import ModuleTree
from morphgraph.torch_io.names import clean, is_path
from morphgraph.torch_io.paths import PathTracer, spell_paths
from morphgraph.torch_io.tensors import to_tensor

RUNNING = ("running_mean", "running_var")
_PERSISTENT = "pkg.torch.export.graph_signature.InputSpec.persistent"


class Homes:
    """Parameters and buffers of the module that is built, each at one path.

    Attributes:
        graph: the fx graph.
        tree: the modules, by dotted path.
        parameters: torch name -> ONNX name, of every parameter and running statistic.
    """

    def __init__(
        self,
        parameters: Sequence[str],
        exported: bool,
        buffers: Collection[str] = (),
        frozen: Collection[str] = (),
    ) -> None:
        self.graph = fx.Graph(tracer_cls=PathTracer)
        self.tree = ModuleTree()
        self.parameters: dict[str, str] = {}
        self._trainable = frozenset(parameters)
        self._buffers = frozenset(buffers)
        self._frozen = frozenset(frozen)
        self._exported = exported
        self._homes: dict[str, str] = {}
        self._reads: dict[str, fx.Node] = {}

    def _is_parameter(self, value: ir.Value) -> bool:
        return value.const_value is not None and name_of(value) in self._trainable

    def _give(self, module: nn.Module, role: str, value: ir.Value) -> None:
        if role in RUNNING:
            module.register_buffer(role, to_tensor(value.const_value))
        else:
            module.register_parameter(role, self._parameter(value))

    def _parameter(self, value: ir.Value) -> nn.Parameter:
        tensor = to_tensor(value.const_value)
        trains = name_of(value) not in self._frozen and tensor.is_floating_point()
        return nn.Parameter(tensor, requires_grad=trains)

    def tie(self, net: fx.GraphModule, path: str, name: str) -> None:
        """Let a parameter be found at a further path in the finished network, as tied weights are.

        Nothing reads it there. A node that does nothing names it, since torch.fx copies and pickles
        what its graph names.
        """
        self.tree.root = net
        home = self._homes.get(name, "")
        parameter = self.tree.get(home) if home else None
        if not isinstance(parameter, nn.Parameter) or not is_path(path, self._exported):
            return
        folder, _, role = path.rpartition(".")
        owner = self.tree.get(folder) if folder else None
        # A module that has a place for it, or a folder.
        vacant = isinstance(owner, nn.Module) and getattr(owner, role, owner) is None
        if vacant or self.tree.is_vacant(path):
            self.tree.put_parameter(path, parameter)
            self.parameters[path] = name
            with net.graph.inserting_before(net.graph.output_node()):
                net.graph.create_node("get_attr", path)
            spell_paths(net.graph)

    def _set_home(self, value: ir.Value, path: str) -> None:
        self._homes[name_of(value)] = path
        self.parameters[path] = name_of(value)

    def _home_of(self, value: ir.Value) -> str:
        """The path of a parameter; one that no module owns is put at the path its name spells."""
        name = name_of(value)
        if name not in self._homes:
            path = self._path_of(name)
            self.tree.put_parameter(path, self._parameter(value))
            self._set_home(value, path)
        return self._homes[name]

    def _path_of(self, name: str) -> str:
        """The path that a tensor's name spells, or the nearest that torch takes."""
        fits = is_path(name, self._exported) and self.tree.is_vacant(name)
        return name if fits else self.tree.unique(clean(name))

    def _buffer(self, value: ir.Value) -> str:
        """The path of a constant tensor."""
        name = name_of(value)
        if name not in self._homes:
            path = self._path_of(name)
            told = value.metadata_props.get(_PERSISTENT)  # by torch's own exporter
            was_buffer = told == "True" or name in self._buffers
            self.tree.put_buffer(path, to_tensor(value.const_value), persistent=was_buffer)
            self._homes[name] = path
            if was_buffer:
                self.parameters[path] = name
        return self._homes[name]

    def _read(self, path: str) -> fx.Node:
        if path not in self._reads:
            self._reads[path] = self.graph.create_node("get_attr", path)
        return self._reads[path]


def name_of(value: ir.Value) -> str:
    """The name of a value, which a canonical model gives to each."""
    assert value.name is not None, "a canonical model names every value"
    return value.name
