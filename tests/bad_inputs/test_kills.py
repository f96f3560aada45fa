"""Commands that are killed, by ``tools/kill_runs.py`` at a few moments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_killed_commands_leave_nothing_half_written() -> None:
    line = ["tools/kill_runs.py", "--count", "3", "--seed", "1", "--commands", "apply,shrink"]
    ran = subprocess.run(
        [sys.executable, *line],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [line.split("|") for line in ran.stdout.splitlines() if line.startswith("| ")]
    kills = {row[1].strip(): row for row in rows if row[2].strip() == "3"}
    assert set(kills) == {"apply", "shrink"}
    assert all(row[-2].strip() == "0" for row in kills.values())
    assert any(int(row[3]) > 0 for row in kills.values())  # killed while they ran
