"""Build the sdist and the wheel, look into them, and use them outside of the checkout.

    python tools/check_wheel.py                       # every Python from 3.11 on that is here
    python tools/check_wheel.py python3.13 --keep     # this one; the folder stays

Each interpreter gets an environment of its own, the wheel with what it requires, and a model to
analyze, plan, apply and verify in an empty folder.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.11", "3.12", "3.13")
# A model that the program makes by itself, so that nothing but the wheel is needed.
USE = """
import sys
import numpy as np
import onnx_ir as ir
import morphgraph as mg

assert "site-packages" in mg.__file__, mg.__file__
from morphgraph.testing import model_from_text

text = '''<ir_version: 10, opset_import: ["": 20]>
net (float[1,3,8,8] x, float[16,3,3,3] w1, float[16] b1, float[8,16,1,1] w2) => (float[1,8,8,8] y) {
  a = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r = Relu(a)
  y = Conv(r, w2)
}'''
mg.save(model_from_text(text), "model.onnx")
data = np.random.default_rng(0).normal(size=(32, 1, 3, 8, 8)).astype(np.float32)
np.savez("inputs.npz", x=data[:, 0])
"""
COMMANDS = (
    "--version",
    "analyze model.onnx",
    "plan model.onnx --budget flops=60% --round-to 1 -o plan.json",
    "apply model.onnx plan.json -o slim.onnx",
    "verify model.onnx plan.json slim.onnx",
    "shrink model.onnx --data inputs.npz --budget flops=60% --round-to 1 -o fitted.onnx",
    "diff model.onnx slim.onnx",
    "bench model.onnx slim.onnx --seconds 0.1",
)


def run(*line: str | Path, cwd: Path | None = None) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(
        [str(word) for word in line], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, line))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path, *options: str) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, of what git knows of the checkout.

    ``options`` are those of ``python -m build``, such as ``--no-isolation``.
    """
    copy = folder / "checkout"
    copy.mkdir()
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        source, target = ROOT / name, copy / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    run(sys.executable, "-m", "build", *options, "--outdir", folder / "dist", copy)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def missing(sdist: Path, wheel: Path) -> list[str]:
    """What the two should hold and do not, and what they should not."""
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as packed:
        installed = set(packed.namelist())
        (metadata,) = [name for name in installed if name.endswith(".dist-info/METADATA")]
        said = packed.read(metadata).decode()
    faults = [f"sdist: no {name}" for name in sorted(_sources() - sources)]
    faults += [f"wheel: no {name}" for name in sorted(_modules() - installed)]
    faults += [f"wheel: {name}" for name in installed if name.split("/")[0] in _OUTSIDE]
    if not any(name.endswith("/licenses/LICENSE") for name in installed):
        faults.append("wheel: no LICENSE")
    wanted = ("Requires-Python: >=3.11", "License-Expression: Apache-2.0", "# morphgraph")
    return faults + [f"metadata: no {line}" for line in wanted if line not in said]


_OUTSIDE = {"passes", "tests", "tools", "docs", "examples", "findings"}


def _package_files() -> Iterator[tuple[Path, str]]:
    """Files of the package, and their names in the wheel."""
    for folder, name in (
        (ROOT / "morphgraph", "morphgraph"),
        (ROOT / "passes", "morphgraph/passes"),
    ):
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                yield path, f"{name}/{path.relative_to(folder).as_posix()}"


def _modules() -> set[str]:
    return {name for _, name in _package_files()}


def _sources() -> set[str]:
    files = {path.relative_to(ROOT).as_posix() for path, _ in _package_files()}
    return files | {"LICENSE", "README.md", "pyproject.toml"}


def use(wheel: Path, interpreter: str, folder: Path) -> None:
    """Install the wheel in a fresh environment, and use it where nothing else is."""
    version = run(interpreter, "--version").split()[1]
    print(f"Python {version}: {interpreter}", flush=True)
    environment, place = folder / f"env-{version}", folder / f"use-{version}"
    place.mkdir()
    run(interpreter, "-m", "venv", environment)
    python = environment / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, wheel, cwd=place)
    run(python, "-I", "-c", USE, cwd=place)
    for command in COMMANDS:
        out = run(environment / "bin" / "morphgraph", *command.split(), cwd=place)
        print(f"  {command}: {(out.strip().splitlines() or ['done'])[-1]}", flush=True)
    shutil.rmtree(environment)  # torch takes gigabytes


def interpreters() -> list[str]:
    """The Pythons of this machine that the project names, one of each version.

    Those on PATH that start, and those of pyenv, whose own commands start no more than one.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = []
    for version in VERSIONS:
        installed = sorted(pyenv.glob(f"{version}.*/bin/python3"))
        candidates = [f"python{version}", *map(str, installed)]
        found += [name for name in candidates if _starts(name)][:1]
    return found


def _starts(interpreter: str) -> bool:
    line = [interpreter, "-c", ""]
    found = shutil.which(interpreter)
    return found is not None and not subprocess.run(line, capture_output=True).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("interpreter", nargs="*", default=interpreters())
    parser.add_argument("--keep", action="store_true", help="keep the folder, and say where it is")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="morphgraph-wheel-"))
    try:
        sdist, wheel = build(folder)
        faults = missing(sdist, wheel)
        for fault in faults:
            print(fault, file=sys.stderr)
        print(f"{sdist.name} {sdist.stat().st_size:,}, {wheel.name} {wheel.stat().st_size:,} bytes")
        for interpreter in [] if faults else options.interpreter:
            use(wheel, interpreter, folder)
    finally:
        if options.keep:
            print(folder)
        else:
            shutil.rmtree(folder)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
