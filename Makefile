# vilma: `make demo` does the main job end to end, `make test` runs the tests. Both set up what they need.

PYTHON   ?= python3
SEED     ?= 0
DEMOS    ?= 100
EPISODES ?= 50
TRAIN    ?=
JOBS     ?= 2
VENV     := .venv
BIN      := $(VENV)/bin
VILMA    := $(BIN)/vilma
READY    := $(VENV)/.ready

export PYTHONSAFEPATH := 1
export MUJOCO_GL ?= osmesa

RUN := runs/demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))

.PHONY: setup system demo test test-long lint format lock wheel clean bench test-timm show-house show-mlstm show-rnn show-vil show-pointmap show-gpu show-imagenet show-calvin check-calvin \
  show-suites check-robocasa check-robocasa02 check-libero check-robomimic check-lerobot
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): requirements.lock pyproject.toml | system
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "vilma needs Python 3.11 or 3.12, got %d.%d: run make PYTHON=python3.11" % v)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

system:
	@sh .ci/system_libraries.sh $(PYTHON)

# Every step is resumable: a second `make demo` reuses what is finished. TRAIN takes overrides of the recipe.
demo: setup
	$(VILMA) collect-robosuite --task Lift --demos $(DEMOS) --placement 0.12 --seed $(SEED) --run $(RUN)
	$(VILMA) train-policy configs/policies/demo_lift.yaml --run $(RUN) --train.seed $(SEED) --data.path $(RUN)/demos.hdf5 $(TRAIN)
	$(VILMA) eval robosuite/Lift $(RUN) --episodes $(EPISODES) --env.placement 0.12
	$(VILMA) eval robosuite/Lift $(RUN) --episodes $(EPISODES) --videos 0
	$(VILMA) eval robosuite/Lift $(RUN) --episodes $(EPISODES) --env.placement 0.12 --blank images,depth --videos 0
	$(VILMA) report $(RUN) --headline robosuite_Lift_placement-0.12
	@echo "open $(RUN)/report.html"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not long"

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m long

# timm's own model tests for every vil* name, from its source distribution; K=vil2_tiny runs those of one.
test-timm: setup
	$(BIN)/python tests/vil/timm_suite.py $(if $(K),-k $(K))

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Exact pins without any index address (numpy 2; nothing in it is built from source).
lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra robot --extra metaworld --extra train --extra export --extra language --extra dev \
	  --no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock

wheel: setup
	$(BIN)/uv build --wheel --quiet --no-build-isolation --python $(BIN)/python --out-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache

# What was measured, beside its target.
show-house: setup
	$(VILMA) show-house

show-mlstm: setup
	OMP_NUM_THREADS=1 $(VILMA) show-mlstm

show-vil: setup
	OMP_NUM_THREADS=1 $(VILMA) show-vil

show-rnn: setup
	OMP_NUM_THREADS=1 $(VILMA) show-rnn

show-pointmap: setup
	OMP_NUM_THREADS=1 $(VILMA) show-pointmap

show-suites: setup
	OMP_NUM_THREADS=1 $(VILMA) show-suites

# Suites that exclude vilma's own packages, each in an environment of its own that is built once, under .cache/suites
# or in SUITE_ENV; RECORD=1 keeps the lines for show-suites.
# check-robocasa02 needs ROBOCASA=path, a clone of robocasa at its tag v0.2.
check-robocasa check-robocasa02 check-libero check-robomimic check-lerobot: check-%: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/contract/run.py $* $(if $(SUITE_ENV),--env $(SUITE_ENV)) \
	  $(if $(ROBOCASA),--source $(ROBOCASA)) $(if $(RECORD),--record)

show-calvin: setup
	OMP_NUM_THREADS=1 $(VILMA) show-calvin

# CALVIN is a clone of calvin_env; its packages go into an environment of their own, beside ours. With CHALLENGE, a
# clone of the challenge's repository, its chains and initial states are drawn too, and compared.
CALVIN_RUN ?= runs/calvin-check
check-calvin: setup
	@test -n "$(CALVIN)" || { echo "usage: make check-calvin CALVIN=path (a clone of calvin_env)"; exit 2; }
	@mkdir -p $(CALVIN_RUN)
	@test -x $(CALVIN_RUN)/venv/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(CALVIN_RUN)/venv
	$(VILMA) doctor calvin --requirements > $(CALVIN_RUN)/requirements.txt
	$(BIN)/uv pip install --quiet --python $(CALVIN_RUN)/venv/bin/python -r requirements.lock -r $(CALVIN_RUN)/requirements.txt
	$(BIN)/uv pip install --quiet --python $(CALVIN_RUN)/venv/bin/python --no-deps -e .
	OMP_NUM_THREADS=1 $(CALVIN_RUN)/venv/bin/vilma check-calvin --source $(CALVIN) $(if $(CHALLENGE),--challenge $(CHALLENGE)) --out $(CALVIN_RUN) --json docs/results/calvin/check.json

show-imagenet: setup
	OMP_NUM_THREADS=1 $(VILMA) show-imagenet

show-gpu: setup
	$(VILMA) show-gpu

bench: setup
	OMP_NUM_THREADS=1 $(VILMA) bench-mlstm
	OMP_NUM_THREADS=1 $(VILMA) bench-vil
	OMP_NUM_THREADS=1 $(VILMA) bench-policy
