# Two commands on a fresh machine: `make repro` runs the pipeline, `make test` the tests. Each sets up .venv first.
PYTHON ?= python3
PORT ?= 5000
MODEL ?= models:/epsd@champion
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: repro test quick ui serve tune check compare

repro: .venv/complete  ## run what is stale of prepare, prune, train, evaluate, detect
	$(BIN)/epsd check --reread && $(BIN)/dvc repro
	@git ls-files --error-unmatch dvc.lock > /dev/null 2>&1 || echo "Next: make ui; epsd. With dvc.lock in git (git add dvc.lock && git commit) experiments have this run to compare with."

compare: .venv/complete  ## the experiments of dvc by the columns that matter; `epsd compare` has every recorded run
	@$(BIN)/dvc exp show --drop '^(?!($(COLUMNS))$$).*' $(SHOW)

COLUMNS := Experiment|seed|objective\.name|prune\.(score\.name|structure|sparsity|macs)|test\.(top1|ece)|map50|model\.compression|latency\.(torch|onnx|int8)_batch1_one_thread_ms

test: .venv/complete  ## every test, three files at a time: many wait for processes that they have started
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

quick: .venv/complete  ## what needs no process of its own: oracles, contracts, hand-worked tables (two minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(QUICK)

QUICK := $(addprefix tests/,oracles scores objectives architectures pruning training data files datasets voc preparing \
  comparison detectors project/test_ranges.py project/test_params.py project/test_code.py test_masks.py test_registry.py \
  test_house.py test_readme.py)

tune: .venv/complete  ## search for better parameters (section tune of params.yaml); TUNE="--trials 40 --workers 2 --resume"
	$(BIN)/epsd check --reread && $(BIN)/dvc repro prepare && $(BIN)/epsd tune $(TUNE)

check: .venv/complete  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

ui: .venv/complete  ## the recorded runs in the browser; a server at MLFLOW_TRACKING_URI has a UI of its own
	@runs=$$($(BIN)/python -m epsd.tracking $(PORT)) && echo "Runs: $$runs   (Ctrl-C ends it)"
	@case "$$MLFLOW_TRACKING_URI" in http*) ;; *) $(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT) --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}" --default-artifact-root "$(CURDIR)/mlruns";; esac

serve: .venv/complete  ## the champion over HTTP; MODEL=models:/epsd@candidate (or a folder) PORT=5001
	@$(BIN)/python -m epsd.tracking > /dev/null
	@model="$(MODEL)"; if [ -d "$$model" ] && [ -n "$$(find "$$model" -type l)" ]; then \
	  mkdir -p .epsd && rm -rf .epsd/served && cp -rL "$$model" .epsd/served && model=.epsd/served; fi; \
	  MLFLOW_TRACKING_URI="$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}" $(BIN)/mlflow models serve --env-manager local --host 127.0.0.1 --port $(PORT) -m "$$model"

# Made again when the lock or the package's own settings change.
.venv/complete: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "epsd needs Python 3.11.4 or later: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv (once, some minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.lock
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@
