# `make` alone says what there is. Every target builds the environment it needs in $(VENV) by itself; it is built again
# only when setup.cfg, pyproject.toml or the constraints have changed.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= tests/constraints.txt
# Options for the one `pip install torch`. PyPI's torch for Linux brings gigabytes of CUDA libraries: without an NVIDIA
# driver, PyTorch's own index of CPU builds is asked too, unless pip's settings name a place for packages already.
NEEDS_CPU_INDEX = $(shell test "$$(uname -s)" = Linux && ! command -v nvidia-smi && ! $(PYTHON) -m pip config list \
    | grep find-links > /dev/null && echo yes)
TORCH_OPTIONS ?= $(if $(NEEDS_CPU_INDEX),--extra-index-url https://download.pytorch.org/whl/cpu)
# Options for pytest: make test PYTEST_OPTIONS="-k windows"
PYTEST_OPTIONS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PACKAGE := $(VENV)/.package
TOOLS := $(VENV)/.tools
METADATA := setup.cfg pyproject.toml $(CONSTRAINTS)

SEGMENTATION := bundles/ms_lesion_segmentation
IMAGE_AND_RECORD := bundles/image_tabular_classification
RUN := $(BIN)/python -m monai.bundle run --config_file

.DEFAULT_GOAL := help
.PHONY: help demo demo-segmentation demo-image-and-record test test-oldest check unittest format docs benchmark clean

help:  ## say what there is
	@echo "Targets (each installs what it needs into $(VENV) by itself):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# One thread is as quick for networks this small, and on a busy machine, where threads wait for each other, many times so:
# the two bundles share the cores instead.
demo: export OMP_NUM_THREADS ?= 1
demo: $(PACKAGE)  ## train, predict and explain on the embedded phantoms (minutes on two cores)
	@$(MAKE) --no-print-directory --jobs 2 demo-segmentation demo-image-and-record
	@echo
	@echo "Predicted lesions and attributions in each scan's own space, for any NIfTI viewer:"
	@find $(SEGMENTATION)/eval -name '*.nii.gz' | sort | sed 's/^/  /' | grep .
	@echo "What radiograph and clinical record each gave to a pneumonia's log-odds, case by case:"
	@find $(IMAGE_AND_RECORD)/eval/modalities -name '*.csv' | sort | sed 's/^/  /' | grep .
	@echo "Curves over the training, and pictures of what the networks look at (images, scalars):"
	@echo "  $(VENV)/bin/tensorboard --logdir_spec lesions:$(SEGMENTATION)/eval,pneumonia:$(IMAGE_AND_RECORD)/eval"

demo-segmentation: $(PACKAGE)
	cd $(SEGMENTATION) && $(RUN) "['configs/train.yaml','configs/explain_train.yaml']" --epochs 6 \
	    --explain_handler::on_error raise
	cd $(SEGMENTATION) && $(RUN) "['configs/inference.yaml','configs/explain.yaml']" --explain_handler::on_error raise

demo-image-and-record: $(PACKAGE)
	cd $(IMAGE_AND_RECORD) && $(RUN) configs/train.yaml --plant redundant --epochs 12
	cd $(IMAGE_AND_RECORD) && $(RUN) "['configs/inference.yaml','configs/explain.yaml']" --plant redundant \
	    --n_others 4 --detailed_cases 2 --modality_handler::on_error raise

test: check unittest  ## everything that .ci/run runs: style, types, tests, doctests, documents

check: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unittest: $(TOOLS)
	$(BIN)/pytest --numprocesses 2 $(PYTEST_OPTIONS)

test-oldest:  ## the tests with the lower bounds of setup.cfg, in an environment of its own
	$(MAKE) unittest VENV=.venv-oldest CONSTRAINTS=tests/constraints-oldest.txt \
	    PYTEST_OPTIONS="-W ignore $(PYTEST_OPTIONS)"    # old releases use what new ones deprecate

format: $(TOOLS)  ## bring the code into the form that `make test` asks for
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: $(TOOLS)  ## build the documentation
	$(BIN)/sphinx-build --fail-on-warning --nitpicky --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

benchmark: $(PACKAGE)  ## measure time and memory beside autograd, Captum and MONAI (an hour, needs 24 GiB)
	$(BIN)/python -m benchmarks

clean:  ## remove the environments and everything that was built
	rm -rf .venv .venv-oldest build dist *.egg-info docs/_build .mypy_cache .pytest_cache .ruff_cache

$(PACKAGE): $(METADATA)
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 13) or sys.exit( \
	    f"monai_xai needs Python 3.10 to 3.12, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12")'
	@echo "Installing monai_xai into $(VENV) (takes a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint $(CONSTRAINTS) $(TORCH_OPTIONS) torch
	@$(PIP) install --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(TOOLS): $(PACKAGE)
	@echo "Installing the tools for tests and documents into $(VENV)"
	@$(PIP) install --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@
