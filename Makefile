# Few verbs do everything; CI runs `make ci`.
#   make setup   the virtual environment in .venv
#   make native  build the native libraries again, if their sources changed
#   make demo    pack the example model, serve it, generate with two workers at once
#   make serve   pack the example model, and serve it: a chat at http://127.0.0.1:8080 (PORT=8080)
#   make test    all tests, in JOBS=3 processes
#   make test-bench  every bench in its quickest form, which make test leaves out (minutes)
#   make test-oldest  what depends on transformers most, with the oldest of its range (a minute)
#   make check   linter, formatter, types, and that the committed protobuf code is fresh
#   make check-deploy  systemd units and alert rules, with Debian's systemd and prometheus
#   make docs    the pages of docs as a site in build/docs, their links checked
#   make screenshots  the pictures of docs/serving.md, taken with Chromium
#   make proto   regenerate the protobuf code, and docs/rpc.md
#   make bench   what docs/benchmarks.md shows, measured here (an hour and a half; BENCH=quick: 4;
#                LLAMA=PYTHON, an interpreter that has llama.cpp, and LLAMA_SERVER=PROGRAM, for
#                it beside ours)
#   make bench-kernels  how near the CPU kernels come to memory's speed
#   make bench-attention  the same of attention, and prompts beside torch's
#   make bench-rows  how fast quantized weights meet several rows of activations, beside one
#   make bench-activations  perplexity of the example model with activations of 16 and 8 bits (minutes)
#   make bench-store  what the store costs on this host, beside its limits (minutes)
#   make bench-decode  tokens per second at real shapes; LLAMA=PYTHON for llama.cpp beside it
#   make bench-batch   tokens per second of 1 to 64 sequences at once; LLAMA=PYTHON as above,
#                   IK=PROGRAM for ik_llama.cpp; python -m bench batch writes its page
#   make bench-serve   a server with 1 to 32 clients; LLAMA=PYTHON LLAMA_SERVER=PROGRAM for
#                   llama-server beside it (half an hour)
#   make bench-executors  what each executor makes of 1, 8 and 32 sequences, to its page (minutes)
#   make bench-prefetch  what hints to the daemon are worth with less RAM than model (minutes)
#   make bench-quantize  what quantizing costs, beside hqq, and a whole packing (minutes)
#   make gpu-slot   everything that only a GPU can tell, the most telling first, in 500 s at most
#                   (GPU_SLOT="--seconds 300 --stages probe,same"; GPU_SLOT=--fake without a GPU)
#   make gpu-test   the tests that need a GPU, under the host's own python3 (two minutes)
#   make gpu-bench  what a GPU host makes of it, to docs/benchmarks (ten minutes)
#   make soak    fuzz, then kill workers and daemons at random for an hour (SECONDS=3600)
#   make soak-serve  kill a server's engines and daemons under streaming clients (ten minutes)
#   make conformance  what others wrote against the server: openai-python's tests, llama.cpp's, lm-eval,
#                   aiperf; docs/conformance.md's tables (a quarter of an hour, and the package index;
#                   CONFORMANCE="--only lm-eval", --help)
#   make architectures  try every MoE of transformers, and write docs/architectures.md (minutes)
#   make train   train the example model again (hours)
#   make ci      what CI runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTO := proto/expertstore/v1/expert_store.proto
# Its plugin protoc-gen-mypy is looked up in PATH.
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto

.PHONY: setup native demo serve test test-bench test-oldest check check-deploy docs screenshots proto bench bench-prefetch bench-store bench-decode bench-batch bench-serve bench-executors bench-attention bench-rows bench-activations bench-quantize gpu-slot gpu-test gpu-bench soak soak-serve conformance architectures train ci all-checks clean
.DELETE_ON_ERROR:

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expertd needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 2; }
	@echo "Setting up $(VENV): a few minutes the first time."
	@# Compiled meanwhile: what pip does takes one core.
	@$(PYTHON) hatch_build.py >/dev/null 2>&1 &
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@# On all cores, which pip does not; some packages have files for a newer Python.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	@touch $@

native: setup
	$(BIN)/python hatch_build.py

demo: setup native
	@$(BIN)/python examples/demo.py

PORT ?= 8080
EXAMPLE_PACK := build/tiny-mixtral

$(EXAMPLE_PACK)/pack.json: | setup native
	@rm -rf $(@D) && mkdir -p $(dir $(@D))
	@$(BIN)/expertd pack examples/tiny-mixtral $(@D)

# The template: this model never saw a chat, and continues what is typed.
serve: setup native $(EXAMPLE_PACK)/pack.json
	@exec $(BIN)/expert-run serve --embedded $(EXAMPLE_PACK) --port $(PORT) \
		--chat-template examples/continue.jinja

# Tests wait more than they compute, so there may be more processes than cores. Each takes the
# tests of whole folders, so that what a module sets up is set up once, and at the end some from
# whoever has most left.
JOBS ?= 3
test: setup native
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(if $(ALONE),$(FAILED_ALONE))

test-bench: setup native
	$(BIN)/python -m pytest -m bench

# The oldest transformers of pyproject's range, in a folder of its own: with that first in Python's
# path, all other packages are those of the virtual environment.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1.0/p' pyproject.toml)
OLDEST_PACKAGES := build/transformers-$(OLDEST)
# What packs, builds and runs models of transformers; the rest hardly knows of it.
OLDEST_TESTS := tests/inference/model/test_architectures.py tests/inference/model/test_hybrid_models.py \
	tests/inference/model/test_nemotron.py tests/inference/execution/test_modules.py \
	tests/inference/engine/test_decoding.py tests/expert_store/packing/test_checkpoint.py

$(OLDEST_PACKAGES)/.ready: | setup
	@rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(@D) transformers==$(OLDEST)
	@touch $@

test-oldest: setup native $(OLDEST_PACKAGES)/.ready
	PYTHONPATH=$(OLDEST_PACKAGES) $(BIN)/python -m pytest $(OLDEST_TESTS)

check: setup docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(PROTOC) --python_out=$$fresh --grpc_python_out=$$fresh --mypy_out=quiet:$$fresh \
		--mypy_grpc_out=quiet:$$fresh $(PROTO) && \
	for file in $$(cd $$fresh && find . -type f); do \
		cmp $$fresh/$$file proto/$$file || \
			{ echo "proto/$$file is stale: run make proto and commit it" >&2; exit 1; }; \
	done && echo "protobuf code is what make proto makes"

check-deploy:
	@deploy/check

docs: setup
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs build/docs
	@! grep -rnE '<(script|link|img|iframe)[^>]* (src|href)="(https?:)?//|url\(.?(https?:)?//|@import' build/docs \
		--include=*.html --include=*.css || { echo "The site asks the network for these." >&2; exit 1; }
	@echo "The site is build/docs/index.html."

screenshots: setup native
	$(BIN)/python docs/screenshots.py

proto: setup
	$(PROTOC) --python_out=proto --grpc_python_out=proto --mypy_out=quiet:proto \
		--mypy_grpc_out=quiet:proto $(PROTO)
	$(BIN)/python docs/rpc_reference.py $(PROTO) > docs/rpc.md

# BENCH=quick: three minutes, to see it work, into build/.
bench: setup native
	@$(BIN)/python -m bench $(if $(filter quick,$(BENCH)),--quick --out build/bench) \
		$(if $(LLAMA),--llama-python $(LLAMA)) \
		$(if $(LLAMA_SERVER),--llama-server $(LLAMA_SERVER))

bench-prefetch: setup native
	@$(BIN)/python -m bench.prefetch

bench-store: setup
	@$(BIN)/python -m bench.store

bench-decode: setup
	@$(BIN)/python -m bench.decode $(if $(LLAMA),--llama-python $(LLAMA))

bench-batch: setup
	@$(BIN)/python -m bench.batch $(if $(LLAMA),--llama-python $(LLAMA)) $(if $(IK),--ik-bench $(IK))

bench-serve: setup native
	@$(BIN)/python -m bench.serve $(if $(LLAMA),--llama-python $(LLAMA)) $(if $(LLAMA_SERVER),--llama-server $(LLAMA_SERVER))

bench-executors: setup native
	@$(BIN)/python -m bench executors

bench-quantize: setup
	@$(BIN)/python -m bench.quantize

# A GPU host's own Python, which has its torch: no virtual environment, no network. Without a GPU
# (--fake), that of the virtual environment.
GPU_PYTHON = PYTHONPATH="$(CURDIR)/build/gpu-site:$(CURDIR)/proto:$(CURDIR)/expert_store:$(CURDIR)/client:$(CURDIR)/inference:$(CURDIR)/tests/doubles:$$PYTHONPATH" \
	$(if $(FAKE_GPU),$(BIN)/python,$(PYTHON))
FAKE_GPU = $(findstring --fake,$(GPU_SLOT) $(GPU_BENCH))

gpu-slot: $(if $(FAKE_GPU),setup native)
	@$(GPU_PYTHON) -m bench.gpu_slot $(GPU_SLOT)

gpu-test:
	@$(GPU_PYTHON) -m bench.gpu_needs
	@$(GPU_PYTHON) hatch_build.py
	@$(GPU_PYTHON) -m tests.on_gpu

gpu-bench: $(if $(FAKE_GPU),setup native)
	@$(if $(FAKE_GPU),,$(GPU_PYTHON) -m bench.gpu_needs)
	@$(if $(FAKE_GPU),,$(GPU_PYTHON) hatch_build.py)
	$(GPU_PYTHON) -m bench.gpu $(GPU_BENCH)

bench-rows: setup native
	@$(BIN)/python -m bench.rows

bench-activations: setup native
	@$(BIN)/python -m bench.activations

bench-kernels: setup native
	@$(BIN)/python -m bench.kernels

bench-attention: setup native
	@$(BIN)/python -m bench.attention

SECONDS ?= 3600
soak: setup
	FUZZ_TIMES=100 $(BIN)/python -m pytest tests/fuzz
	@for restarts in cold warm; do \
		$(BIN)/python -m tests.campaign --worker-kills 5000 --daemon-kills 500 \
			--seconds $$(($(SECONDS) / 2)) --restarts $$restarts || exit 1; \
	done

soak-serve: setup native
	@$(BIN)/python -m tests.serve_campaign

conformance: setup native
	@$(BIN)/python -m tests.conformance $(CONFORMANCE)

architectures: setup
	@$(BIN)/python -m tests.architectures

train: setup
	$(BIN)/python examples/tiny-mixtral/train.py

# Tests of real processes on a machine that is busy with other things: the few that fail beside
# the others run again alone, and that decides. Both are printed. Exit status 1: tests failed.
FAILED_ALONE = || { [ $$? = 1 ] && echo "These failed beside the others; alone:" && \
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none --maxfail 1; }

# Checks and tests at the same time: neither needs the other, and no core waits for the last test.
ci: setup native
	$(MAKE) -j 2 test all-checks ALONE=1

all-checks: check check-deploy test-oldest

clean:
	rm -rf $(VENV) build
