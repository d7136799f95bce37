# make demo            turn an MRI into planes and back, then draw new volumes: under 15 minutes on two cores
# make demo-fit        run the first part of the demo alone
# make test            run the test suite
# make test-all        run it with the tests that take minutes, and the three targets below
# make test-releases   test wheels under other releases of Python and torch
# make test-emulated   run the GPU tests of the ops on the emulated CUDA kernels
# make test-arm        run the tests of the ops on the CPU kernels of ARM, under qemu
# make rehearse        run every step of benchmarks/run_gpu.sh without a GPU
# make rehearse-short  run those of its steps that take about a minute
# make campaign        try the ops and commands with random problems, kills, damaged files and full disks: hours, resumable
# make lint            run ruff, mypy and clang-format
# make format          fix what ruff and clang-format can fix
# make build           install the packages and build the kernels
# make bench           run benchmarks/bench_decode_grid.py
# make clean           delete builds and the demo's folder
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,dev
# Two processes, because most tests use one core; a file's tests share what they train.
TWO := -n 2 --dist loadfile

.PHONY: help demo demo-fit test test-all test-releases test-emulated test-arm rehearse rehearse-short campaign build lint format clean bench
help:
	@sed -n 's/^# make/make/p' Makefile

# The packages and the kernels, again when a source changes.
$(VENV)/.built: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off -e '.[$(EXTRAS)]'
	touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/python -m tcam_diff.demo

demo-fit: build
	$(BIN)/python -m tcam_diff.demo --fit-only

test: build
	$(BIN)/python -m pytest $(TWO)

test-all: build test-releases test-emulated rehearse
	$(BIN)/python -m pytest $(TWO)
	$(BIN)/python -m pytest -m exhaustive -n auto

test-arm: build
	TCAM_TEST_ARM="$$($(BIN)/python tests/ops/arm.py build/arm)" $(BIN)/python -m pytest --hypothesis-profile=card \
	  $(addprefix tests/ops/test_,decode_grid.py decode_grid_loss.py points.py conventions.py projects.py noise.py skips.py) \
	  -k "not cuda and not isa and not installed and not memory and not thread"

test-emulated: build
	TCAM_TEST_EMULATED="$$($(BIN)/python tests/ops/simt.py build/simt)" \
	  $(BIN)/python -m pytest tests/ops -m gpu --hypothesis-profile=card -n auto

rehearse: build
	$(BIN)/python benchmarks/rehearse.py
rehearse-short: build
	$(BIN)/python benchmarks/rehearse.py --short

campaign: build
	$(BIN)/python tests/campaign/run.py
	$(BIN)/python tests/campaign/report.py

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
