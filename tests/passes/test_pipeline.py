"""The page of the pipeline, in ``morphgraph.passes``, is what lies in the folder."""

import re
from pathlib import Path

import morphgraph.passes

ROOT = Path(__file__).parents[2] / "passes"


def page() -> dict[str, list[str]]:
    """The modules of every stage, in the page's order; a stage that is one module has none."""
    stages: dict[str, list[str]] = {}
    for line in (morphgraph.passes.__doc__ or "").splitlines():
        stage = re.match(r"([a-z]+): ", line)
        module = re.match(r" {4,8}([a-z_]+) ", line)
        if stage:
            stages[stage[1]] = []
        elif module:
            list(stages.values())[-1].append(module[1])
    return stages


def test_the_page_names_every_module_once() -> None:
    listed = [
        f"{stage}/{module}.py" if module else f"{stage}.py"
        for stage, modules in page().items()
        for module in modules or [""]
    ]
    files = [str(path.relative_to(ROOT)) for path in ROOT.rglob("[!_]*.py")]
    assert sorted(listed) == sorted(files)


def test_the_stages_stand_in_the_order_of_the_layers() -> None:
    layers = (ROOT.parent / "tests" / "test_layers.py").read_text(encoding="utf-8")
    order = re.findall(r"passes\.(\w+)", layers.split("LAYERS", 1)[1].split("RANK", 1)[0])
    assert list(page()) == order
