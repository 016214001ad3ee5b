# make lab   set up and open the course in JupyterLab      make test  set up and check everything
# make help  the rest. PYTHON=python3.12 picks the interpreter of a new .venv.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LAB_FLAGS := $(shell test "$$(id -u)" = 0 && echo --allow-root) $(if $(or $(DISPLAY),$(WAYLAND_DISPLAY),$(filter Darwin,$(shell uname))),,--no-browser)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: lab test docs run gpu gpu-apply gpu-light gpu-wheels clean setup help

help:
	@echo "make lab            open the course in JupyterLab (set-up included)"
	@echo "make test           run every check at smoke scale (set-up included)"
	@echo "make run NB=a.ipynb execute a notebook in place, keep its outputs, clean it"
	@echo "make gpu            CUDA tests, benchmarks, trainings, lessons: BUDGET=540 seconds, TO=folder"
	@echo "make gpu-apply      take over what make gpu made: FROM=folder"
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

# The machine may be bare: torch, transformers, accelerate, and wheels in .whl (`make gpu-wheels`)
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
BUDGET ?= 540
gpu:
	$(GPU_PYTHON) .ci/gpu.py run --budget $(BUDGET) $(if $(TO),--out $(TO)) $(if $(REHEARSE),--rehearse)

gpu-apply:
	@test -n "$(FROM)" || { echo "From which folder? make gpu-apply FROM=folder"; exit 1; }
	$(GPU_PYTHON) .ci/gpu.py apply $(FROM)

# The tree that travels may hold 64 MiB: what the list trains anew stays at home. Then `git reset -q`,
# and take the lines off .git/info/exclude.
HEAVY = gpt-small hybrid-small metis-small metis-acoustic-small music-causal
gpu-light:
	git rm -rq --cached $(HEAVY:%=data/checkpoints/%)
	printf 'data/checkpoints/%s/\n' $(HEAVY) >> .git/info/exclude

gpu-wheels: $(READY)
	$(BIN)/python .ci/gpu.py wheels

docs: $(READY)
	@command -v quarto >/dev/null || $(BIN)/python -m pip install --quiet quarto-cli || \
		{ echo "make docs needs Quarto: it is not on PATH, and 'pip install quarto-cli' could not fetch it."; \
		  echo "Install Quarto by hand, or run 'make test', whose docs check works without it."; exit 1; }
	@quarto --version >/dev/null 2>&1 || { echo "quarto is on PATH but does not run."; exit 1; }
	$(BIN)/nbdev_docs
	@echo "The site is in _docs/: $(BIN)/python -m http.server -d _docs, then http://localhost:8000"

clean:
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
