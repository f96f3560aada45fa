"""How long does the quick start take, from a fresh clone and a fresh environment?

    python tools/time_quickstart.py

Clones the commit that is checked out, installs it as docs/quickstart.md says, and runs the
commands and the program of that page in an empty folder, in processes of their own.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def timed(words: str, *line: str | Path, cwd: Path, path: str | None = None) -> float:
    """Run a program, which must succeed, and say how long it took."""
    started = time.perf_counter()
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(
        [str(word) for word in line], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr}")
    seconds = time.perf_counter() - started
    print(f"{seconds:7.1f} s  {words}", flush=True)
    return seconds


def main() -> None:
    """Print the time of every step, and their sum."""
    with tempfile.TemporaryDirectory(prefix="morphgraph-quickstart-") as temporary:
        clone, place = Path(temporary, "morphgraph"), Path(temporary, "work")
        place.mkdir()
        binary = clone / ".venv" / "bin"
        total = timed("git clone", "git", "clone", "--quiet", ROOT, clone, cwd=place)
        total += timed("python3 -m venv", sys.executable, "-m", "venv", ".venv", cwd=clone)
        constraints = ("-c", clone / "constraints.txt")
        install = (binary / "pip", "install", "--quiet", *constraints, ".")
        total += timed("pip install .", *install, cwd=clone)
        for language, block in _BLOCK.findall((clone / "docs" / "quickstart.md").read_text()):
            if language == "python":
                program = (binary / "python", "-c", block)
                total += timed("the program", *program, cwd=place)
                continue
            for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
                line = ("bash", "-c", command)
                total += timed(command, *line, cwd=place, path=str(binary))
        print(f"{total:7.1f} s  in all, {total / 60:.1f} minutes")


if __name__ == "__main__":
    main()
