"""Broken and hostile plans: one line that names the field, nothing left behind."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest

from morphgraph.passes.lift import lift
from morphgraph.passes.planning.uniform import uniform
from morphgraph.testing.limited import Ran, run_limited

TIMEOUT_SECONDS = 120


class Case(NamedTuple):
    """Makes a bad plan of the dictionary that a sound one is; the code, and what the line says."""

    make: Callable[[Path, dict[str, Any]], object]
    says: tuple[str, ...]
    code: int = 3


PLANS: dict[str, Case] = {}


def bad_plan(*says: str) -> Callable[[Callable[[dict[str, Any]], Any]], object]:
    """Register a function that spoils a sound plan, or returns what the file holds instead."""

    def register(change: Callable[[dict[str, Any]], Any]) -> object:
        def make(path: Path, plan: dict[str, Any]) -> None:
            content = change(plan)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(plan).encode())

        PLANS[change.__name__] = Case(make, ("bad.json", *says))
        return change

    return register


def bad_path(*says: str, code: int = 4) -> Callable[[Callable[[Path], object]], object]:
    """Register a function that makes something at the plan's path that is no file to read."""

    def register(make: Callable[[Path], object]) -> object:
        PLANS[make.__name__] = Case(lambda path, _plan: make(path), ("bad.json", *says), code)
        return make

    return register


@bad_plan("model.structure", "another network")
def other_model(plan: dict[str, Any]) -> None:
    plan["model"]["structure"] = "0" * 64


@bad_plan("schema_version", "2")
def newer_schema(plan: dict[str, Any]) -> None:
    plan["schema_version"] = 2


@bad_plan("groups", "width")
def width_zero(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["width"] = 0


@bad_plan("width 0 of g1 'conv0'", "no longer depend on any input", "keep at least one")
def nothing_kept(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = []


@bad_plan("groups.g1.width", "9")
def wrong_width(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["width"] = 9


@bad_plan("groups.g1.keep", "range")
def index_out_of_range(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 9]]


@bad_plan("keep", "groups")
def index_negative(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[-1, 4]]


@bad_plan("groups.g1.keep", "repeats")
def index_twice(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 3], [2, 5]]


@bad_plan("groups.g1.width", "8")
def range_of_petabytes(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 2**50]]
    plan["groups"]["g1"]["width"] = 2**50


@bad_plan("bad.json")
def number_too_large(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 2**70]]
    plan["groups"]["g1"]["width"] = 2**70


@bad_plan("JSON")
def not_a_number(plan: dict[str, Any]) -> None:
    plan["cost"]["flops"]["after"] = math.nan


@bad_plan("groups.g99", "no such group")
def unknown_group(plan: dict[str, Any]) -> None:
    plan["groups"]["g99"] = plan["groups"].pop("g1")


@bad_plan("groups", "surprise")
def unknown_field(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["surprise"] = 1


@bad_plan("groups.g1.new")
def too_many_new_channels(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["new"] = 10**12


@bad_plan("groups.g0", "graph input")
def pinned_group(plan: dict[str, Any]) -> None:
    plan["groups"]["g0"] = {"name": "x", "width": 3, "keep": [[0, 1]]}


@bad_plan("JSON")
def empty_plan(plan: dict[str, Any]) -> bytes:
    return b""


@bad_plan("JSON")
def deep_plan(plan: dict[str, Any]) -> bytes:
    return b"[" * 100_000


@bad_plan("schema_version")
def list_for_plan(plan: dict[str, Any]) -> bytes:
    return b"[1, 2]"


@bad_plan("bytes")
def plan_of_100_megabytes(plan: dict[str, Any]) -> bytes:
    return bytes(100_000_000)


@bad_plan("JSON")
def no_text(plan: dict[str, Any]) -> bytes:
    return b"\xff\xfe" * 100


@bad_plan("groups")
def groups_that_are_a_list(plan: dict[str, Any]) -> None:
    plan["groups"] = [plan["groups"]]


@bad_plan("keep")
def range_of_fractions(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 1.5]]


@bad_plan("keep")
def range_of_three(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["keep"] = [[0, 1, 2]]


@bad_plan("\\x1b[31m")
def unknown_field_with_controls(plan: dict[str, Any]) -> None:
    plan["groups"]["g1"]["\x1b[31m\n"] = 1


@bad_plan("groups.\\x1b[2Jg1", "no such group")
def unknown_group_with_controls(plan: dict[str, Any]) -> None:
    plan["groups"]["\x1b[2Jg1"] = plan["groups"].pop("g1")


@bad_plan("lift")
def lifted_in_an_unknown_way(plan: dict[str, Any]) -> None:
    plan["model"]["lift"] = {"attention": "tails"}


@bad_plan("'x'")
def lifted_at_impossible_sizes(plan: dict[str, Any]) -> None:
    plan["model"]["lift"] = {"input_shapes": {"x": [1, 3, 0, 8]}}


@bad_plan("'nobody'")
def lifted_at_sizes_of_nobody(plan: dict[str, Any]) -> None:
    plan["model"]["lift"] = {"input_shapes": {"nobody": [1, 3]}}


@bad_plan("JSON")
def number_of_10000_digits(plan: dict[str, Any]) -> bytes:
    text = json.dumps(plan)
    return text.replace('"width": 8', '"width": ' + "9" * 10_000).encode()


@bad_path("No such file")
def plan_missing(path: Path) -> None:
    assert not path.exists()


@bad_path("folder")
def plan_is_a_folder(path: Path) -> None:
    path.mkdir()


@bad_path("ordinary file")
def plan_is_a_pipe(path: Path) -> None:
    os.mkfifo(path)


@bad_path("ordinary file")
def plan_without_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


COMMANDS: dict[str, list[str]] = {
    "apply": ["apply", "sound.onnx", "bad.json", "-o", "new.onnx"],
    "verify": ["verify", "sound.onnx", "bad.json", "sound.onnx"],
    "expand": ["expand", "sound.onnx", "bad.json", "--budget", "flops=100%", "-o", "new.json"],
}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, sound_model: Callable[[], onnx.ModelProto]
) -> Mapping[tuple[str, str], Ran]:
    root = tmp_path_factory.mktemp("plans")
    jobs: dict[tuple[str, str], tuple[Path, list[str]]] = {}
    plan = uniform(lift(sound_model()), 0.5).to_json()
    for name, case in PLANS.items():
        folder = root / name
        folder.mkdir()
        (folder / "sound.onnx").write_bytes(sound_model().SerializeToString())
        case.make(folder / "bad.json", json.loads(plan))
        jobs.update(((name, command), (folder, line)) for command, line in COMMANDS.items())
    return dict(zip(jobs, run_limited(jobs.values(), TIMEOUT_SECONDS), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", PLANS)
def test_bad_plans(results: Mapping[tuple[str, str], Ran], name: str, command: str) -> None:
    ran, case = results[name, command], PLANS[name]
    assert ran.code == case.code, ran.err
    assert ran.out == ""
    assert ran.err.startswith("morphgraph: error: "), ran.err
    assert ran.err.count("\n") == 1, ran.err
    assert "\x1b" not in ran.err
    assert "unexpected" not in ran.err
    for fragment in case.says:
        assert fragment in ran.err, ran.err
    assert ran.made == ran.spoilt == ()
