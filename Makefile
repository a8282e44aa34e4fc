# `make` lists the targets. Every target that runs Python first makes .venv from the requirements if it is missing or stale.
.DEFAULT_GOAL := help
.PHONY: help setup demo dashboard ablations notebook web app docs mmcv wheels test test-fast lint types check format clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Two workers; a file's tests stay together, because they share what is slow to make.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.core ## Make the environment .venv for the commands of the README, and nothing else
	@echo "ready: $(BIN)/python predict.py checkpoint=camvid input=street.jpg"

demo: $(VENV)/.core ## Train PEM on drawn street scenes: minutes on two CPU cores, no download (ARGS="key=value ..." to change it)
	$(BIN)/python train.py $(ARGS)

dashboard: $(VENV)/.core ## Show all runs, those under way too, on a local page: curves, settings, pictures (PORT=6006 RUNS="outputs multirun")
	@$(BIN)/python scripts/dashboard.py $(RUNS) $(if $(PORT),--port $(PORT))

# conf/scale/synthetic_small.yaml states the scale. Finished jobs are not run again, so an interrupted call goes on; a job
# that fails does not keep the others from the report. Six layers are the unchanged network's, which the first sweep has. A job
# takes two minutes: one that is cut off starts again, and needs no last.ckpt.
ABLATIONS := multirun/ablations
SWEEP := scale=synthetic_small hydra/launcher=joblib seed=0,1 \
	callbacks.best.save_weights_only=true callbacks.last=null callbacks.panels=null callbacks.confusion=null $(ARGS)
ablations: $(VENV)/.dev ## Train all variants of the network on drawn street scenes and report: an hour on two CPU cores
	@failed=0; \
	sweep() { $(BIN)/python train.py "$$@" $(SWEEP) || { test $$? -lt 128 || exit 130; failed=1; }; }; \
	sweep sweep=paper_ablations hydra.sweep.dir=$(ABLATIONS)/parts; \
	sweep sweep=paper_depth hydra.sweep.dir=$(ABLATIONS)/depth decoder_layers=1,2,3,4,5,7,8,9; \
	$(BIN)/python scripts/ablation_report.py $(ABLATIONS) --output report && exit $$failed

notebook: $(VENV)/.notebooks ## Open the notebooks in the browser: look inside a network, compare ablations
	$(BIN)/jupyter lab notebooks

web: $(VENV)/.export ## Segment photographs in the browser alone, on a local page (PORT=8000 MODEL=best.onnx; needs npm)
	@$(BIN)/python web/build.py $(MODEL)
	@$(BIN)/python web/serve.py web/dist $(or $(PORT),8000)

app: $(VENV)/.app ## Segment photographs and short videos on a local page (ARGS="checkpoint=best.ckpt port=7861")
	@$(BIN)/python app.py $(ARGS)

docs: $(VENV)/.docs ## Build the documentation into site/ (ARGS=serve shows it on a local page)
	@$(BIN)/zensical $(or $(ARGS),build --strict)

mmcv: $(VENV)/.core ## Build mmcv's deformable operators for the installed torch, an option for GPUs (10 to 40 minutes)
	@$(BIN)/python scripts/build_mmcv.py

wheels: $(VENV)/.dev ## Download what scripts/gpu_check.py needs on a machine with torch and no network (WHEELS=wheels PYTHON_VERSION=3.12 HAS="numpy scipy")
	@$(BIN)/python scripts/wheels.py $(or $(WHEELS),wheels) $(if $(PYTHON_VERSION),--python-version $(PYTHON_VERSION)) $(if $(HAS),--has $(HAS))

test: $(VENV)/.dev ## Run all tests (ARGS="-k name" to choose)
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.dev ## Run the tests that take seconds
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(VENV)/.dev ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Check types
	$(BIN)/mypy

check: lint types test ## Everything that has to pass before a commit

format: $(VENV)/.dev ## Apply the format, and the fixes that are safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and caches; runs and data stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last, so an interrupted installation is taken up again.
$(VENV)/.core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: Python 3.10 or newer is needed; name one: make PYTHON=python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "error: cannot make a virtual environment; install Python's venv (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "Installing requirements into $(VENV) (some minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.core $(addprefix requirements-,dev.txt docs.txt eval.txt export.txt hub.txt sweep.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.export: $(VENV)/.core requirements-export.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-export.txt
	@touch $@

$(VENV)/.notebooks: $(VENV)/.core requirements-notebooks.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-notebooks.txt
	@touch $@

$(VENV)/.app: $(VENV)/.core requirements-app.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt
	@touch $@

# The pages are made from the sources alone, so nothing of requirements.txt is needed.
$(VENV)/.docs: requirements-docs.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@
