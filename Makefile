# make speak TEXT="..."  and  make test  need nothing set up before: python3 (3.10 or newer, with venv), gcc and a
# package registry. Everything is installed into .venv; `make clean` removes it again.

PYTHON ?= python3
TEXT ?= Hello. I am a small voice, and I speak without a network.
ARGS ?=
CUDA ?= 13
VENV := .venv
BIN := $(VENV)/bin
export TEXT

# what an editable install has to be repeated for
BUILT_FROM := pyproject.toml setup.py $(wildcard soprano_cupy/[cg]pu/build.py soprano_cupy/[cg]pu/*.p[yx][xdi] \
	soprano_cupy/[cg]pu/csrc/*.[ch])
C_SOURCES = $(shell find kernels soprano_cupy/[cg]pu/csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.[ch]' \
	-o -name '*.[ch]pp')
BENCHMARKS = benchmarks/parity.py benchmarks/attention.py benchmarks/launch.py benchmarks/runtime.py \
	benchmarks/persistent.py benchmarks/crowd.py benchmarks/several_gpus.py

.PHONY: help speak test lint format test-gpu sanitize-gpu bench-gpu wheel clean

help:
	@echo 'make speak TEXT="..."   speak with the bundled voice into speech.wav'
	@echo 'make test               run every test that needs no GPU (ARGS="-k name" picks some)'
	@echo 'make lint               ruff, mypy and clang-format; make format applies what they can'
	@echo 'make test-gpu           run the tests that need a GPU (CUDA=12 for an older driver)'
	@echo 'make sanitize-gpu       run the kernels under compute-sanitizer'
	@echo 'make bench-gpu          measure on a GPU into benchmarks/results/'
	@echo 'make wheel              build dist/*.tar.gz and dist/*.whl'
	@echo 'make clean              remove everything that was built'

speak: $(VENV)/package
	@$(BIN)/soprano-cupy generate -v -m mini -t "$$TEXT" -o speech.wav

test: $(VENV)/test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo clang-format --dry-run
	@$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(C_SOURCES)
	@$(BIN)/clang-format -i $(C_SOURCES)  # a string broken in a macro settles in the second pass

test-gpu: $(VENV)/gpu
	$(BIN)/python -m pytest -m gpu $(ARGS)

# one small call of every kernel and form, with each array an allocation of its own
SANITIZED = test_ragged_batches or test_slices_of_a_real_cache or test_decode_lengths and (65 or 511) and (1- or 15) \
	or test_lengths_on_and_off_the_tiles and (63 or 129 or 40) or test_types_and_heads and float32 and 64

SANITIZED_ENGINE = test_odd_sizes or test_steps_are_those_of_the_package or test_attention_is_accurate \
	or test_the_planned_kernel and (-1] or -17] or -65]) or test_matches_float64 and (GELU and 300 or RESIDUAL and 333) \
	or test_whole_voices and -8] or test_streams and -50] or test_forward_against or test_rounds_and_results

sanitize-gpu: $(VENV)/gpu
	@set -e; for tool in memcheck racecheck initcheck; do SOPRANO_SANITIZE=1 compute-sanitizer --tool $$tool \
		--error-exitcode 1 $(BIN)/python -m pytest -q -m gpu tests/test_attention_gpu.py -k "$(SANITIZED)"; \
		SOPRANO_SANITIZE=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest -q -m gpu \
		tests/test_step_gpu.py tests/test_linear_gpu.py tests/test_linear_hopper_gpu.py tests/test_vocos_gpu.py \
		tests/test_gpu_engine.py -k "$(SANITIZED_ENGINE)"; done

bench-gpu: $(VENV)/gpu
	@set -e; for program in $(BENCHMARKS); do $(BIN)/python $$program; done

wheel: $(VENV)/wheel
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find soprano_cupy tests benchmarks tools -name __pycache__ -prune -exec rm -rf {} +
	rm -f soprano_cupy/[cg]pu/*.so soprano_cupy/[cg]pu/_*.c

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo 'python3 cannot make an environment: apt install python3-venv' >&2; exit 1; }

# -e: the checkout itself is the package; its extension modules are compiled here, unless they are newer than their
# sources already
$(VENV)/package $(VENV)/test $(VENV)/lint $(VENV)/gpu: $(BIN)/python $(BUILT_FROM)
	@echo 'installing into $(VENV), once'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.$(EXTRAS)'
	@touch $(VENV)/package $@

$(VENV)/test: EXTRAS := [test]
$(VENV)/lint: EXTRAS := [test,lint]
$(VENV)/gpu: EXTRAS := [test,cuda$(CUDA)]

$(VENV)/wheel: $(BIN)/python
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'build>=1.2'
	@touch $@
