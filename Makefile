# make lab   set up and open the course in JupyterLab      make test  set up and check everything
# make help  the rest. PYTHON=python3.12 picks the interpreter of a new .venv.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LAB_FLAGS := $(shell test "$$(id -u)" = 0 && echo --allow-root) $(if $(or $(DISPLAY),$(WAYLAND_DISPLAY),$(filter Darwin,$(shell uname))),,--no-browser)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: lab test docs run gpu clean setup help

help:
	@echo "make lab            open the course in JupyterLab (set-up included)"
	@echo "make test           run every check at smoke scale (set-up included)"
	@echo "make run NB=a.ipynb execute a notebook in place, keep its outputs, clean it"
	@echo "make gpu            execute the cells that need CUDA, in place"
	@echo "make docs           build the site into _docs with Quarto"
	@echo "make clean          remove .venv and what was built (not the corpus cache)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "speechlab needs Python 3.10 to 3.13; set PYTHON=…"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	@echo "Installing PyTorch, JupyterLab and the rest: a few minutes, once."
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $(READY)

lab: $(READY)
	$(BIN)/speechlab corpus build
	$(BIN)/jupyter lab $(LAB_FLAGS) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb

test: $(READY)
	$(BIN)/python .ci/checks.py

run: $(READY)
	@test -n "$(NB)" || { echo "Which notebook? make run NB=nbs/tokenizer/01_rvq.ipynb"; exit 1; }
	$(BIN)/python .ci/run_notebook.py $(NB)

gpu: $(READY)
	@$(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || \
		{ echo "make gpu needs a CUDA GPU, and PyTorch sees none."; exit 1; }
	SPEECHLAB_SCALE=gpu $(BIN)/python .ci/run_notebook.py --flags "cuda slow" $(or $(NB),$(shell find nbs -name '*.ipynb' -not -path '*/.*'))

docs: $(READY)
	@command -v quarto >/dev/null || $(BIN)/python -m pip install --quiet quarto-cli || \
		{ echo "make docs needs Quarto: it is not on PATH, and 'pip install quarto-cli' could not fetch it."; \
		  echo "Install Quarto by hand, or run 'make test', whose docs check works without it."; exit 1; }
	@quarto --version >/dev/null 2>&1 || { echo "quarto is on PATH but does not run."; exit 1; }
	$(BIN)/nbdev_docs
	@echo "The site is in _docs/: open _docs/index.html"

clean:
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
