# Targets of ragpair; `make help` lists them. Everything lands in .venv/, .make/, rag/ and var/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_VERSION ?= 2.13.0
TORCH_INDEX_URL ?=
EXTRAS ?= cpu,demo,bench,dev
PYTEST_ARGS ?=
BENCH_ARGS ?=
QUICK ?=
JSON ?=
PLOT ?=
Q ?=

comma := ,
STAMPS := .make
bench_flags = $(if $(QUICK),--quick) $(if $(JSON),--json "$(JSON)") $(BENCH_ARGS)
VENV_STAMP := $(STAMPS)/venv-$(subst $(comma),-,$(EXTRAS))
STUBS_STAMP := $(STAMPS)/stubs
PROTOS := $(shell find proto -name '*.proto')
say = @printf '\033[1m==> %s\033[0m\n' $(1)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(VENV_STAMP) ## create .venv with the locked dependencies (TORCH_INDEX_URL= picks another torch build)

$(VENV_STAMP): pyproject.toml constraints.txt setup.py generator_service/model/cpu_kernels.cpp
	$(call say,"creating $(VENV) with $(PYTHON)")
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, {sys.executable} is {sys.version.split()[0]}: set PYTHON=…")'
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear $(VENV) || { echo "no venv module: on Debian or Ubuntu, apt install python3.11-venv"; exit 1; }
	$(call say,"installing torch $(TORCH_VERSION)")
	@$(BIN)/python -m pip install --progress-bar on -c constraints.txt $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") "torch==$(TORCH_VERSION)"
	$(call say,"installing ragpair[$(EXTRAS)] with the versions of constraints.txt")
	@$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[$(EXTRAS)]'
	@mkdir -p $(STAMPS) && touch $@

.PHONY: proto
proto: $(STUBS_STAMP) ## build the stubs of proto/ into rag/

$(STUBS_STAMP): $(VENV_STAMP) $(PROTOS) scripts/build_stubs.py
	$(call say,"building the stubs of proto/")
	@$(BIN)/python scripts/build_stubs.py
	@mkdir -p $(STAMPS) && touch $@

.PHONY: setup
setup: venv proto ## everything that the other targets need

.PHONY: run
run: setup ## start the pair, answer a demo question, serve until Ctrl-C (ONCE=1 stops after the answer)
	@ONCE="$(ONCE)" $(BIN)/python -m demo.run

.PHONY: ask
ask: setup ## ask a running pair: make ask Q="What is the capital of France?"
	@test -n "$(Q)" || { echo 'which question? make ask Q="…"'; exit 2; }
	@$(BIN)/rag ask "$(Q)"

.PHONY: demo-index
demo-index: setup ## build the index of the demo corpus
	@$(BIN)/python -m demo.build_index

.PHONY: eval-demo
eval-demo: setup ## measure the demo through the running pair; all questions renew docs/calibration.md, QUICK=1 asks 40
	@$(BIN)/python -m demo.evaluate $(if $(QUICK),,--report-folder docs)

.PHONY: bench-engine
bench-engine: setup ## the engine against Hugging Face (QUICK=1 the smaller part, JSON=file writes rows)
	@$(BIN)/python -m bench.micro.engine $(bench_flags)

.PHONY: bench-ablation
bench-ablation: setup ## the engine without each of its ideas (QUICK=1, JSON=file, BENCH_ARGS="--device cuda:0")
	@$(BIN)/python -m bench.micro.ablation $(bench_flags)

.PHONY: bench-gpu
bench-gpu: setup ## on a CUDA device: the engine against Hugging Face and the card's floor (QUICK=1, JSON=file)
	@$(BIN)/python -m bench.micro.gpu $(bench_flags)

.PHONY: bench-retriever
bench-retriever: setup ## the served retriever against faiss and RagRetriever (QUICK=1, JSON=file)
	@$(BIN)/python -m bench.retriever $(bench_flags)

.PHONY: load
load: setup ## latency under load, continuous beside gather-then-run batching (QUICK=1, JSON=file)
	@$(BIN)/python -m bench.load.batching $(bench_flags)

.PHONY: bench-served
bench-served: setup ## the service beside its engine called in process (QUICK=1, JSON=file)
	@$(BIN)/python -m bench.load.served $(bench_flags)

.PHONY: bench-growth
bench-growth: setup ## how cost grows with documents, beams and lengths (QUICK=1, JSON=file, PLOT=file.svg)
	@$(BIN)/python -m bench.micro.growth $(if $(PLOT),--plot "$(PLOT)") $(bench_flags)

.PHONY: lint
lint: setup lint-python lint-proto lint-deploy ## all linters: ruff, mypy, import-linter, buf, hadolint, kubernetes-validate

.PHONY: lint-python
lint-python: setup
	$(call say,"ruff")
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	$(call say,"mypy --strict")
	@$(BIN)/mypy
	$(call say,"import-linter")
	@$(BIN)/lint-imports --no-logo

.PHONY: lint-proto
lint-proto: setup
	$(call say,"buf lint")
	@$(BIN)/buf lint

.PHONY: lint-deploy
lint-deploy: setup
	$(call say,"deploy/")
	@PATH="$(abspath $(BIN)):$$PATH" deploy/lint

.PHONY: format
format: setup ## rewrite the sources as ruff would have them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: test
test: setup ## run every test (PYTEST_ARGS= picks some)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: test-milvus
test-milvus: setup ## the tests of the Milvus backend on Milvus' own engine: half an hour, most of it waiting
	@$(BIN)/python -m pytest --milvus standalone tests/retriever_service -k milvus $(PYTEST_ARGS)

.PHONY: faults
faults: setup ## kill what changes a corpus, each kind of process N=200 times, and check what is left
	@for what in corpus build service milvus; do OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $$what --kills "$(or $(N),200)"; done
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults milvus-engine --kills "$(or $(N),40)"

.PHONY: clean
clean: ## remove what was built; var/ (indexes) and .venv go too
	rm -rf $(VENV) $(STAMPS) rag var build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
