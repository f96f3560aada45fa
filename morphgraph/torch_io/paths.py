"""Python that torch.fx writes for a graph, right for module paths of any spelling.

It writes ``self.heads.class`` for a module that stands there, which is no Python, and quotes names
without escaping them. The code is corrected as it is generated, by fx's own hook; a tracer does the
same for the graph that unpickling makes of it.
"""

from typing import Any

from torch import fx

from morphgraph.torch_io.names import is_spelled_plainly


class PathTracer(fx.Tracer):
    """Traces a network back to a graph whose code can be compiled; torch.fx unpickles by it."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module's forward."""
        graph = super().trace(root, concrete_args)
        spell_paths(graph)
        return graph


def spell_paths(graph: fx.Graph) -> None:
    """Let the graph's code reach every module and tensor that it has now, whatever its path.

    >>> from torch import nn
    >>> net = nn.Module()
    >>> net.heads = nn.ModuleDict({"class": nn.ReLU()})
    >>> graph = fx.Graph()
    >>> _ = graph.output(graph.call_module("heads.class", (graph.placeholder("x"),)))
    >>> spell_paths(graph)
    >>> print(fx.GraphModule(net, graph).code.strip().splitlines()[1].strip())
    heads_class = getattr(getattr(self, 'heads'), 'class')(x);  x = None
    """
    targets = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    spelled = {_as_fx_writes(t): _access(t) for t in targets if not is_spelled_plainly(t)}
    if not spelled:
        return

    def correct(lines: list[str]) -> list[str]:
        return [_corrected(line, spelled) for line in lines]

    graph.on_generate_code(lambda _earlier: correct)


def _corrected(line: str, spelled: dict[str, str]) -> str:
    result, sign, read = line.partition(" = ")
    for wrong, right in spelled.items():
        if read == wrong or read.startswith(f"{wrong}("):
            return f"{result}{sign}{right}{read.removeprefix(wrong)}"
    return line


def _as_fx_writes(path: str) -> str:
    written = "self"
    for part in path.split("."):
        is_attribute = part.isidentifier()
        written = f"{written}.{part}" if is_attribute else f'getattr({written}, "{part}")'
    return written


def _access(path: str) -> str:
    written = "self"
    for part in path.split("."):
        written = f"getattr({written}, {part!r})"
    return written
