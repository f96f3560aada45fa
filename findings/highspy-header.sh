#!/usr/bin/env bash
# highspy 1.16.0 writes two lines to the standard output as soon as a solver is made, before anybody can
# tell it to be silent; 1.15.0 does not.
# What was seen, and when: findings/README.md. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'PYTHON'
import subprocess
import sys

HEADER = "Running HiGHS"
SOLVE = """
import numpy as np
import highspy
solver = highspy.Highs()
solver.silent()
x = solver.addVariable(lb=0, ub=4)
solver.maximize(x)
assert solver.getObjectiveValue() == 4
"""
FIRST_SILENT = """
import highspy
class Silent(highspy.Highs):
    def enableCallbacks(self):
        self.silent()
        super().enableCallbacks()
solver = Silent()
x = solver.addVariable(lb=0, ub=4)
solver.maximize(x)
assert solver.getObjectiveValue() == 4
"""
written = {}
for name, program in {"silent()": SOLVE, "silent() from the constructor": FIRST_SILENT}.items():
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    written[name] = done.stdout.splitlines()
    print(f"  {name}: {len(written[name])} lines" + "".join(f"\n    {x}" for x in written[name]))
wanted = 2 if sys.argv[1] == "1.16.0" else 0
assert len(written["silent()"]) == wanted, written
assert all(HEADER in lines[0] for lines in written.values() if lines)
assert not written["silent() from the constructor"]
PYTHON
for version in 1.15.0 1.16.0; do
    "${PYTHON:-python3}" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "highspy==$version" numpy==2.4.6
    echo "highspy $version"
    "$folder/$version/bin/python" "$folder/show.py" "$version"
done
