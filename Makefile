# edm_nb: two commands are enough, `make book` and `make test`. Both install what they lack into .venv.
PYTHON ?= python3
# newest, or oldest: the lower bounds of settings.ini. Decided when .venv is made.
VERSIONS ?= newest
BIN := .venv/bin
STAMP := .venv/.installed
# None in a source archive.
WORKFLOWS := $(wildcard .github/workflows/*.yml)
BENCHMARKS := ideal_denoiser samplers stochastic data networks augmentation metrics training

# Real CIFAR-10 images are used where they are found; set EDM_NB_CIFAR10 to your own copy.
ifeq ($(strip $(EDM_NB_CIFAR10)),)
  EDM_NB_CIFAR10 := $(abspath $(firstword $(wildcard ../shared/data/cifar10-jpeg-train.zip)))
endif
ifneq ($(strip $(EDM_NB_CIFAR10)),)
  export EDM_NB_CIFAR10
endif

.DEFAULT_GOAL := help
.PHONY: help install export tidy check browser run book test test-fast package newest-nbdev lab bench studies demo clean

help:  ## show the targets (the default)
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install the package with all it needs

$(STAMP): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "edm_nb needs Python 3.10 or newer, and $(PYTHON) is older: try make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	sed -n '/^requirements/,/^$$/s/>=/==/p' settings.ini >.venv/oldest.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[book,dev]' $(if $(filter oldest,$(VERSIONS)),-c .venv/oldest.txt)
	touch $@

export: $(STAMP)  ## write edm_nb/ from the notebooks
	$(BIN)/nbdev_export

tidy: $(STAMP)  ## clean the notebooks' metadata and write edm_nb/ anew; the outputs stay
	$(BIN)/python book/check.py --fix

check: $(STAMP)  ## what takes seconds: the export is fresh, the notebooks are clean, no name is undefined, workflows fit their schema
	$(BIN)/python book/check.py
	$(BIN)/ruff check -q .
	$(if $(WORKFLOWS),$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS))

run: $(STAMP)  ## execute the notebooks and keep the outputs in nbs/, cleaned
	$(BIN)/python book/execute.py --in-place

book: $(STAMP)  ## execute every notebook and build the HTML book from those copies
	$(BIN)/python book/explorer.py
	$(BIN)/python book/execute.py
	$(BIN)/python book/build.py

browser:  ## install Chromium for the explorer's tests, where apt is there and may (without it they are skipped)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 \
	  || echo "browser: apt could not install chromium and chromium-driver; the browser tests will be skipped" >&2; \
	else echo "browser: install chromium and chromedriver (Debian: chromium, chromium-driver) to run the browser tests" >&2; fi

test: check browser  ## check the export, execute the notebooks, run pytest
	$(BIN)/python book/execute.py
	$(BIN)/python book/build.py
	EDM_NB_EXECUTED=_build/executed EDM_NB_SITE=_build/html $(BIN)/python -m pytest -q --durations=10 -m 'not slow and not gpu'

test-fast: check  ## for the inner loop: notebooks that you changed, tests that do not train
	$(BIN)/python book/execute.py --changed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 -m 'not slow and not gpu and not training'

package: $(STAMP)  ## build wheel and source archive, and try the wheel in an empty environment
	$(BIN)/python -m pytest -q --durations=10 -m slow tests/test_distribution.py

newest-nbdev: $(STAMP)  ## what the newest nbdev would make of this project
	$(BIN)/python book/newest_nbdev.py

lab: $(STAMP)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

bench: $(STAMP)  ## run the benchmarks that need no GPU
	for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

studies: $(STAMP)  ## list the studies; STUDY="churn quality" runs one (minutes to hours)
ifeq ($(strip $(STUDY)),)
	@for file in studies/*.py; do printf '%-16s %s\n' "$$(basename $$file .py)" "$$(sed -n '1s/"""//gp' $$file)"; done
	@printf '%-16s %s\n' gpu "$$(sed -n '1s/"""//gp' studies/gpu/command.py) (python -m studies.gpu --help)"
	@echo 'Run one with: make studies STUDY="NAME [arguments]"; STUDY="NAME --help" explains it.'
else
	$(BIN)/python studies/$(firstword $(STUDY))$(if $(wildcard studies/$(firstword $(STUDY))/__main__.py),,.py) $(wordlist 2,$(words $(STUDY)),$(STUDY))
endif

demo: $(STAMP)  ## train, sample and measure a digits model (a few minutes)
	$(BIN)/edm-nb demo --out runs/demo

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf _build .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
