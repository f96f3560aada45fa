"""Configs that build a user's own class say its new sizes, or why they cannot."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import morphgraph as mg
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.uniform import set_widths
from morphgraph.torch_io import config_ties as config_ties_module
from morphgraph.torch_io.config_builds import ConfigBuilds
from morphgraph.torch_io.config_ties import config_ties
from morphgraph.torch_io.resize_module import ModuleReport

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


@dataclass
class NetConfig:
    width: int = 12
    heads: int = 3
    layers: int = 2
    inner: int | None = None
    scaled: bool = False


class CheckedConfig(NetConfig):
    """One that is written and read, and looks at its numbers then."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CheckedConfig":
        if values["width"] % values["heads"]:
            raise ValueError(f"the width ({values['width']}) is no multiple of the heads")
        return cls(**values)


class Block(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_dim = getattr(config, "head_dim", config.width // config.heads)
        inner = 4 * config.width if config.inner is None else config.inner
        self.q, self.k, self.v = (
            nn.Linear(config.width, self.heads * self.head_dim) for _ in range(3)
        )
        self.o = nn.Linear(self.heads * self.head_dim, config.width)
        self.up, self.down = nn.Linear(config.width, inner), nn.Linear(inner, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = float(config.width) ** 0.5 if config.scaled else 1.0
        self.stem, self.head = nn.Linear(6, config.width), nn.Linear(config.width, 4)
        self.h = nn.ModuleList([Block(config) for _ in range(config.layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x) * self.scale
        for block in self.h:
            x = block(x)
        return self.head(x)


def resized(config: NetConfig, widths: dict[str, int]) -> tuple[Net, ModuleReport]:
    torch.manual_seed(0)
    net = Net(config).eval()
    graph = mg.lift(mg.export(net, X))
    by_glob: dict[str, int | str] = {
        group.id: width
        for group in graph.groups
        for part, width in widths.items()
        if part in group.name
    }
    return net, mg.resize_module(net, graph, set_widths(graph, by_glob), example=X)


SAID: dict[str, tuple[Callable[[], NetConfig], dict[str, int], dict[str, int | None]]] = {
    "width and heads by one ratio": (NetConfig, {"residual": 8, "attention": 2, "up": 48},
        {"width": 8, "heads": 2, "inner": 48}),
    "an inner width that followed": (NetConfig, {".up": 20}, {"inner": 20, "width": 12}),
    "a head's size that is asked for": (NetConfig, {"attention": 2},
        {"heads": 2, "head_dim": 4, "inner": None}),
    "numbers alike": (lambda: NetConfig(16, 4, 4, inner=16), {"attention": 3, ".up": 10},
        {"width": 16, "heads": 3, "layers": 4, "inner": 10, "head_dim": 4}),
    "checked when read": (CheckedConfig, {"residual": 8, "attention": 2}, {"width": 8, "heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_a_config_says_the_new_sizes(case: str) -> None:
    make, widths, entries = SAID[case]
    net, report = resized(make(), widths)
    assert report.config == f"{type(net.config).__name__} builds this network"
    assert {key: getattr(net.config, key) for key in entries} == entries
    again = Net(net.config).eval()
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(X), net(X))


UNSAID = {
    "unequal": (NetConfig(), {"0.up": 20}, r"unequal widths .*'h\.0\.up', 'h\.1\.up'.*--same"),
    "refused": (CheckedConfig(), {"residual": 8}, r"refuses them \(.*no multiple of the heads"),
    "scale": (NetConfig(scaled=True), {"residual": 8, "attention": 2}, r"something else.*'scale'"),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_a_config_cannot_say_is_told(case: str) -> None:
    config, widths, words = UNSAID[case]
    with pytest.warns(mg.MorphWarning, match=words):
        net, report = resized(config, widths)
    assert "cannot say" in report.config
    assert report.error < 1e-4
    assert "head_dim" not in vars(net.config)


@pytest.mark.parametrize("make", [NetConfig, CheckedConfig, lambda: NetConfig(scaled=True)])
@pytest.mark.parametrize("budget", ["85%", "65%", "45%"])
def test_a_plan_for_a_config_ends_at_widths_that_it_says(
    make: Callable[[], NetConfig], budget: str
) -> None:
    config = make()
    config.width, config.heads, config.inner = 24, 6, 40
    torch.manual_seed(0)
    net = Net(config).eval()
    graph = mg.lift(mg.export(net, X))
    plan = mg.plan(graph, {"params": budget}, config=net, round_to=1)
    report = mg.resize_module(net, graph, plan, example=X)
    assert report.config == f"{type(config).__name__} builds this network"
    if config.scaled:  # by the width, which therefore stays
        assert config.width == 24
    else:
        assert config.width < 24
    again = Net(net.config).eval()
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(X), net(X))


def test_a_network_without_a_config_is_told() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    graph = mg.lift(mg.export(net, X))
    with pytest.raises(mg.MorphError, match=r"no module of Sequential is what its own config"):
        mg.plan(graph, {"params": "50%"}, config=net)


def test_a_refusal_names_the_numbers_of_the_plan() -> None:
    """And no guess of the search, which looks for other numbers that build the same shapes."""
    config = CheckedConfig(width=24, heads=6)
    with pytest.warns(mg.MorphWarning, match=r"refuses them \(the width \(20\) is no multiple"):
        resized(config, {"residual": 20})


SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
DEEP: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_head": 4, "n_layer": 5, "n_positions": 16},
    "Qwen3ForCausalLM": {
        **SMALL, "head_dim": 8, "num_key_value_heads": 2, "num_hidden_layers": 5,
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3,
    },
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4,
                                   "num_layers": 4, "num_decoder_layers": 5},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.long] if k.startswith("T5") else []) for k in DEEP]
)
def test_few_of_the_blocks_of_a_class_tell_what_all_do(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    architecture = getattr(transformers, kind)
    config = architecture.config_class(**DEEP[kind] | {"vocab_size": 50})
    net = architecture(config).eval()
    ids = {"input_ids": torch.zeros((1, 4), dtype=torch.int64), "use_cache": False}
    if config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    graph = mg.lift(mg.export(net, ids))
    bounds = WidthBounds(same=("repeated",))
    built: list[int] = []
    shapes_alone = ConfigBuilds.shapes_alone

    def counted(builds: ConfigBuilds, *arguments: Any) -> nn.Module | None:
        made = shapes_alone(builds, *arguments)
        built.append(0 if made is None else len([*made.parameters()]))
        return made

    monkeypatch.setattr(ConfigBuilds, "shapes_alone", counted)
    ties = config_ties(graph, bounds, net)
    whole = len([*net.parameters()])
    assert 2 * sum(count == whole for count in built) < len(built)
    monkeypatch.setattr(config_ties_module, "_MOST_BLOCKS", 0)
    assert config_ties(graph, bounds, net) == ties
    assert ties.of == type(config).__name__


@dataclass
class LoggedConfig(NetConfig):
    """It says what it thinks whenever it is read, as those of transformers do."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoggedConfig":
        logging.getLogger("transformers").warning("a width of %s", values["width"])
        return cls(**values)


def test_numbers_that_are_tried_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    builds = ConfigBuilds(Net(LoggedConfig()))
    caplog.clear()
    net = builds.shapes_alone({"width": 24})
    assert net is not None
    assert net.config.width == 24
    assert not caplog.records
    LoggedConfig.from_dict(asdict(LoggedConfig()))  # it goes on as before
    assert caplog.records
