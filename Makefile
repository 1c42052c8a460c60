# edm_nb: two commands are enough, `make book` and `make test`. Both install what they lack into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BENCHMARKS := ideal_denoiser samplers stochastic data networks augmentation metrics training

# Real CIFAR-10 images are used where they are found; set EDM_NB_CIFAR10 to your own copy.
ifeq ($(strip $(EDM_NB_CIFAR10)),)
  EDM_NB_CIFAR10 := $(abspath $(firstword $(wildcard ../shared/data/cifar10-jpeg-train.zip)))
endif
ifneq ($(strip $(EDM_NB_CIFAR10)),)
  export EDM_NB_CIFAR10
endif

.DEFAULT_GOAL := help
.PHONY: help install export run check book test lab bench demo clean

help:  ## show the targets (the default)
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install the package with all it needs

$(STAMP): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "edm_nb needs Python 3.10 or newer, and $(PYTHON) is older: try make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[book,dev]'
	touch $@

export: $(STAMP)  ## write edm_nb/ from the notebooks
	$(BIN)/nbdev_export

run: $(STAMP)  ## execute the notebooks and keep the outputs in nbs/, cleaned
	$(BIN)/python book/execute.py --in-place

book: $(STAMP)  ## execute every notebook and build the HTML book from those copies
	$(BIN)/python book/execute.py
	$(BIN)/python book/build.py

test: $(STAMP)  ## check the export, execute the notebooks, run pytest
	$(BIN)/python book/check.py
	$(BIN)/python book/execute.py
	EDM_NB_EXECUTED=_build/executed $(BIN)/python -m pytest -q -m 'not slow and not gpu'

lab: $(STAMP)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

bench: $(STAMP)  ## run the benchmarks that need no GPU
	for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

demo: $(STAMP)  ## train, sample and measure a digits model (a few minutes)
	$(BIN)/edm-nb demo --out runs/demo

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf _build .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
