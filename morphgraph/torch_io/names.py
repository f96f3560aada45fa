"""Names in PyTorch: the paths of modules and parameters, and what the exporter noted of them."""

import ast
import keyword
import re
import unicodedata
from collections.abc import Mapping

import onnx_ir as ir
from torch import fx, nn

from morphgraph.ops import OpNode

_NAMES_KEY = "morphgraph.parameters"
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"


def clean(name: str) -> str:
    """A name that can be an attribute in Python: no dots, no slashes.

    >>> clean("conv0/weights:0")
    'conv0_weights_0'
    """
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "unnamed"
    return f"_{plain}" if plain[0].isdigit() else plain


# What the code that torch.fx writes reads beside its arguments.
_READ_BY_CODE = frozenset(
    [
        *keyword.kwlist,
        *("self", "Self", "torch", "device", "fx_pytree", "pytree", "NoneType", "inf", "nan"),
        *("getattr", "slice", "range", "float", "int", "bool", "complex"),
        *("list", "tuple", "dict", "set"),
    ]
)


def as_argument(name: str) -> str:
    """A name that can be an argument of a network's forward.

    >>> as_argument("in/put:0"), as_argument("class")
    ('in_put_0', 'class_')
    """
    plain = clean(name)
    return f"{plain}_" if plain in _READ_BY_CODE else plain


def is_path(name: str, exported: bool) -> bool:
    """Whether a name can stay a torch path; torch itself allows more in it than Python does."""
    part = r"[^.]+" if exported else r"\w+"
    return re.fullmatch(rf"{part}(\.{part})*", name, flags=re.ASCII) is not None


def is_spelled_plainly(path: str) -> bool:
    """Whether Python that torch.fx writes, ``self.heads.box``, reads what stands at a path.

    >>> is_spelled_plainly("layer1.0.a b.weight"), is_spelled_plainly("heads.class.weight")
    (True, False)
    """
    # It quotes what is no identifier, but does not escape; Python normalizes what it reads.
    return not any(
        keyword.iskeyword(part)
        or re.search(r"[\"\\\n\r]", part)
        or (part.isidentifier() and unicodedata.normalize("NFKC", part) != part)
        for part in path.split(".")
    )


def shared_path(names: Mapping[str, str], exported: bool) -> str | None:
    """The module path of operands named ``path.role``, each by its role."""
    paths = {name.removesuffix(f".{role}") for role, name in names.items()}
    matching = all(name.endswith(f".{role}") for role, name in names.items())
    return paths.pop() if matching and len(paths) == 1 and is_path(min(paths), exported) else None


def module_path(node: ir.Node) -> str | None:
    """The path of the module in whose own forward the exporter met a node; ``None``: not known."""
    scopes = node.metadata_props.get(_SCOPES)
    paths = ast.literal_eval(scopes) if scopes else []
    if len(paths) < 2:
        return None
    return re.sub(r"@\d+", "", str(paths[-2]))  # a module that is called again


def scope_of(n: OpNode, class_name: str) -> str:
    """Where the module that made this node stood, or a name made of the node's own."""
    scopes, classes = n.ir.metadata_props.get(_SCOPES), n.ir.metadata_props.get(_CLASSES)
    if not scopes or not classes:
        return clean(n.name or class_name)
    paths, kinds = ast.literal_eval(scopes), ast.literal_eval(classes)
    if len(paths) < 2 or len(kinds) < 2 or not is_path(paths[-2] or "_", True):
        return clean(n.name or class_name)
    if paths[-2] and kinds[-2].rpartition(".")[2] == class_name:
        return str(paths[-2])
    return f"{paths[-2]}.{class_name.lower()}".lstrip(".")


def record_names(net: fx.GraphModule, names: dict[str, str]) -> None:
    """Note on a network what its tensors are called in ONNX, by their torch names.

    Copying a GraphModule keeps ``meta`` and drops attributes; pickling does the reverse.
    """
    net.meta[_NAMES_KEY] = names
    vars(net)["onnx_names"] = names


def recorded_names(net: nn.Module) -> Mapping[str, str]:
    """The ONNX names of a network's tensors by their torch names, where they differ."""
    recorded = net.meta.get(_NAMES_KEY) if isinstance(net, fx.GraphModule) else None
    names: Mapping[str, str] = recorded or getattr(net, "onnx_names", {})
    return names
