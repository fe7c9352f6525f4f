# Everything runs in .venv, which the first target to need it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= batchnorm-lab/convergence

.PHONY: demo docs site browser evidence test interpreted quick lint format mutants sanitize bench gpu clean

demo: $(VENV)/lab.stamp
	$(BIN)/batchnorm lab run --profile quick --out $(OUT)

# The documentation in both languages, with all that it needs to be read offline: built, and served to
# this machine; `make site` builds only, and `batchnorm article` opens what is built.
PORT ?= 8000
docs: $(VENV)/site.stamp
	$(BIN)/python website/build.py --serve --port $(PORT)

site: $(VENV)/site.stamp
	$(BIN)/python website/build.py

# What the tests of the site's pages need: Chromium, as Debian has it.
browser:
	@if command -v chromium || command -v google-chrome; then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium; \
	else echo "Chromium is missing. Install it (as root: apt-get install chromium), or go without:" \
	  "the tests that need it are skipped."; exit 1; fi

# Every experiment, quick and full, with all that is made from them: pages, pictures, the numbers in
# the article. Goes on where it was stopped; an hour on a small machine.
evidence: $(VENV)/lab.stamp
	$(BIN)/batchnorm lab run --all --out docs/evidence
	$(BIN)/batchnorm lab run --all --profile full --out docs/evidence
	$(BIN)/batchnorm lab report docs/evidence
	$(BIN)/python benchmarks/lab_minutes.py docs/evidence
	$(BIN)/python website/pictures.py
	$(BIN)/python website/quoted.py --write

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(MAKE) interpreted

# The Triton kernels' tests without a GPU, in Triton's interpreter; and those of what is built on them,
# by them: suites of which many tests call whole kernels, in float32 or less.
CONTRACTS := $(addprefix tests/, \
  layers/test_batch_norm.py layers/test_layouts.py layers/test_persistence.py \
  test_autograd_kernels.py test_functional.py test_ghost.py test_ghost_layer.py test_ghost_masks.py \
  test_numerics.py test_renorm.py test_renorm_faults.py test_sync.py \
  tools/test_accumulate.py tools/test_bank.py tools/test_freeze.py tools/test_pause.py \
  tools/test_recalibrate_state.py)
interpreted: $(VENV)/dev.stamp
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels/triton
	TRITON_INTERPRET=1 BATCHNORM_DISABLE=native $(BIN)/python -m pytest -n 2 --dist worksteal $(CONTRACTS)

quick: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Deletes each line of the mathematics in turn and checks that some test fails. Takes a while.
mutants: $(VENV)/dev.stamp
	$(BIN)/python tests/mutants.py

# The kernels' tests with a build that watches every access, overflow and shift.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
sanitize: $(VENV)/dev.stamp
	CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build_ext --force \
	  --build-lib build/sanitize --build-temp build/sanitize/temp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=268435456 \
	  BATCHNORM_NATIVE_LIBRARY=build/sanitize/batchnorm/kernels/native/_kernels.abi3.so \
	  $(BIN)/python -m pytest -q -p no:xdist -m "not slow" tests/kernels/test_native*.py \
	  tests/test_autograd_kernels.py

$(VENV)/bin/python:
	@echo "Creating $(VENV) and installing torch and the rest: a few minutes the first time."
	$(PYTHON) -m venv $(VENV)

# What the C++ kernels are built with. They need the torch that they will run with, so pip must not
# build in an environment of its own.
BUILD := setuptools torch
NATIVE := setup.py $(wildcard src/batchnorm/kernels/native/*.cpp src/batchnorm/kernels/native/*.h)

$(VENV)/build.stamp: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt $(BUILD)
	touch $@

$(VENV)/lab.stamp: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/build.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[lab]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/build.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@ $(VENV)/lab.stamp $(VENV)/site.stamp

$(VENV)/site.stamp: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/build.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[site]'
	touch $@ $(VENV)/lab.stamp

# How fast the layer is here, beside torch: half an hour on a quiet machine; SUITE=quick takes one minute.
SUITE ?= full
bench: $(VENV)/lab.stamp
	$(BIN)/batchnorm bench --suite $(SUITE) \
	  --json benchmarks/results/cpu$(if $(filter-out full,$(SUITE)),-$(SUITE)).json

# On a machine with a CUDA GPU: is everything right there, and how fast; at most 8 minutes. It takes
# the python3 that is there, or PYTHON=…, with its torch and triton: no environment is made. OUT=folder
# gets copies.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(if $(filter-out file,$(origin OUT)),--out "$(OUT)")

clean:
	rm -rf $(VENV) build dist src/batchnorm/site src/batchnorm/kernels/native/*.so src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
