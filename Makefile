# make demo       one command from a fresh clone to pictures of a brain and of new ones: under 15 minutes on two cores
# make demo-fit   its first part alone: one volume to planes and back
# make test       the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,dev

.PHONY: help demo demo-fit test test-all test-releases test-emulated rehearse rehearse-short build lint format clean bench
help:
	@sed -n 's/^# //p' Makefile; echo "make test-all | test-releases | test-emulated | rehearse | lint | format | build | bench | clean"

# The packages, installed once; the kernels, again when a source changed.
$(VENV)/.packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/.built: $(VENV)/.packages setup.py $(shell find csrc -type f)
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/python -m tcam_diff.demo

demo-fit: build
	$(BIN)/python -m tcam_diff.demo --fit-only

test: build
	$(BIN)/python -m pytest

test-all: build test-releases test-emulated rehearse
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m exhaustive -n auto

# The GPU tests of the ops on the emulated CUDA kernels.
test-emulated: build
	TCAM_TEST_EMULATED="$$($(BIN)/python tests/ops/simt.py build/simt)" \
	  $(BIN)/python -m pytest tests/ops -m gpu --hypothesis-profile=card -n auto

# The script for a GPU that is at hand for minutes, every step, without one; and what of it takes a minute.
rehearse: build
	$(BIN)/python benchmarks/rehearse.py
rehearse-short: build
	$(BIN)/python benchmarks/rehearse.py --short

test-releases: build
	$(BIN)/tox

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

bench: build
	$(BIN)/python benchmarks/bench_decode_grid.py

clean:
	rm -rf build dist *.egg-info tcam_ext/*.so demo
