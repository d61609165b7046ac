# make demo | quick | test | test-full | check | bench | simulate | gpu: each alone makes .venv, installs, and does its job.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo quick test test-full check bench simulate gpu clean

demo: .venv/.installed
	$(BIN)/gengap demo

# one thread each: processes whose threads wait for each other on two cores take five times as long; four of them,
# as tests wait for starts and clusters half of their time; files in the order of tests/conftest.py; bytecode is written
# whatever the environment says: to compile the package takes each of some hundred interpreters 0.2 s
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/test_launch_files.py -n 4 --dist loadfile \
	--no-loadscope-reorder

quick: .venv/.installed-dev
	$(PYTEST) -m "not processes"

test: .venv/.installed-dev
	$(PYTEST)

test-full: .venv/.installed-dev
	GENGAP_FULL=1 $(PYTEST)

# the last of these is launch/ and docker/, which `make test` leaves out
check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest --quiet tests/test_launch_files.py

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/peers.py --data $(or $(GENGAP_DATA),data)
	$(BIN)/python benchmarks/gpt_throughput.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/overhead.py probes
	$(BIN)/python benchmarks/overhead.py checkpoints
	$(BIN)/python benchmarks/overhead.py ray
	$(BIN)/python benchmarks/gram_floor.py
	$(BIN)/python benchmarks/probe_cost.py
	$(BIN)/python benchmarks/aggregate.py
	$(BIN)/python benchmarks/epoch.py --data $(or $(GENGAP_DATA),data)/cifar10-jpeg --jpeg

# how often the rules of verdicts err: the table of docs/statistics.md
simulate: .venv/.installed-dev
	$(BIN)/python benchmarks/verdicts.py --out docs/benchmarks/verdicts.json
	$(BIN)/python benchmarks/page.py

# on a machine with a GPU; PART=correctness, sync, memory, speed or compile: docs/gpu.md
gpu: .venv/.installed
	$(BIN)/python benchmarks/gpu.py $(if $(PART),--part $(PART))

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@ .venv/.installed

clean:
	rm -rf .venv demo build *.egg-info
