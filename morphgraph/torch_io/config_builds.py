"""Networks that a config builds: their shapes alone, or whole with another network's parameters."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from morphgraph.torch_io.logs import unlogged


class ConfigBuilds:
    """What the class of a module builds from the module's config with some entries changed.

    Attributes:
        config: the module's config.
    """

    def __init__(self, module: nn.Module) -> None:
        self.config = module.config
        self._module = module
        self._loads = _survives_loading(self.config)

    def shapes_alone(self, values: Mapping[str, Any], checked: bool = True) -> nn.Module | None:
        """The network on the meta device; ``None`` where the class or its config refuses.

        What the config says when it is loaded counts where it is ``checked``.
        """
        try:
            config = self._changed(values, checked)
        except Exception:  # noqa: BLE001  validators of a config raise anything
            return None
        return self._built(config)

    def whole(self, values: Mapping[str, Any], checked: bool = True) -> nn.Module | None:
        """The network with the module's parameters and persistent buffers; the rest is its own."""
        built = self.numbers_alone(values, checked)
        if built is None:
            return None
        try:
            built.load_state_dict(self._module.state_dict(), strict=False, assign=True)
            built.to(next(self._module.parameters()).device)
        except Exception:  # noqa: BLE001  a parameter or buffer of another shape
            return None
        return None if any(p.is_meta for p in built.parameters()) else built

    def numbers_alone(self, values: Mapping[str, Any], checked: bool = True) -> nn.Module | None:
        """The network with its own buffers and factors, and parameters without memory."""
        try:
            with (
                torch.random.fork_rng(devices=[]),
                _parameters_on_meta(),
                _Uninitialized(),
                unlogged(),
            ):
                return type(self._module)(self._changed(values, checked))
        except Exception:  # noqa: BLE001  the class or its config
            return None

    def refusal(self, values: Mapping[str, Any]) -> str:
        """What a config with these entries says when it is loaded; empty: it loads."""
        try:
            self._changed(values)
        except Exception as error:  # noqa: BLE001  validators of a config raise anything
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return lines[-1] if lines else type(error).__name__
        return ""

    def asked(self) -> list[str]:
        """Entries without a number that the class asks its config for, and gets a default for.

        A config answers by properties and aliases as well as by its table, so that what is asked
        shows in its class alone: one build is given a copy of a class that notes it.
        """
        asked: dict[str, None] = {}

        class Watched(type(self.config)):  # type: ignore[misc]
            def __getattribute__(self, name: str) -> Any:
                value = None
                try:
                    value = super().__getattribute__(name)
                    return value
                finally:
                    if value is None:
                        asked[name] = None

        config = Watched.__new__(Watched)
        config.__dict__.update(vars(copy.deepcopy(self.config)))
        self._built(config)
        return [name for name in asked if not name.startswith("_")]

    def _built(self, config: Any) -> nn.Module | None:
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.device("meta"),
                _Uninitialized(),
                unlogged(),
            ):
                return type(self._module)(config)
        except Exception:  # noqa: BLE001  a class of the user's own may raise anything
            return None

    def _changed(self, values: Mapping[str, Any], checked: bool = True) -> Any:
        config = copy.deepcopy(self.config)
        vars(config).update(values)
        if self._loads and checked:
            _load_again(config)
        return config


def _load_again(config: Any) -> None:
    """Write a config and read it, as ``from_pretrained`` does; what it checks is checked then."""
    # What it thinks of numbers that are only tried is no news.
    with unlogged():
        type(config).from_dict(config.to_dict())


def _survives_loading(config: Any) -> bool:
    if not (hasattr(config, "to_dict") and hasattr(type(config), "from_dict")):
        return False
    try:
        _load_again(config)
    except Exception:  # noqa: BLE001  then it tells nothing of other numbers either
        return False
    return True


class _Uninitialized(TorchFunctionMode):
    """Leaves tensors without memory as they are: drawing their numbers takes most of a build."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            tensor = next(
                (t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None
            )
            if tensor is not None and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made meanwhile have their buffers, but parameters without memory."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
