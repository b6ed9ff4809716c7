# Two commands do everything on a fresh machine: make demo, make test. Two measure: make gpu-check, make bench.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo

.PHONY: demo test test-processors lint gpu-check bench report clean

demo: $(DEMO)/data/train/text_embeddings
	$(RUN) train.py --config configs/demo.yaml --run-dir $(DEMO)

$(DEMO)/data/captions.txt: | $(VENV)/.installed
	$(RUN) -m textlock.demo.scenes --output $(DEMO)/data

$(DEMO)/text_tower/origin.json: | $(VENV)/.installed
	$(RUN) -m textlock.demo.sentence_encoder --output $(DEMO)/text_tower

$(DEMO)/data/train/text_embeddings: $(DEMO)/data/captions.txt $(DEMO)/text_tower/origin.json
	$(RUN) -m textlock.data.embeddings $(DEMO)/data/train --tower $(DEMO)/text_tower
	touch $@

# A process a core, one thread each, at most eight: a process may take four GiB.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-test lint
	$(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The numeric tests with other instruction sets, numbers of threads and roundings than this machine's own: half an hour.
test-processors: $(VENV)/.installed-test
	$(RUN) -m textlock.tests.processors $(ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p textlock.kernels -p textlock.models -p textlock.data -p textlock.engine -p textlock.evals \
		-p textlock.exports -p textlock.search -p textlock.demo -p textlock.bench -m textlock.settings -m textlock.train \
		-m textlock.evaluate -m textlock.export -m textlock.explore

# A machine with a GPU may have everything but a package registry: without .venv its own Python is used as it is.
HERE := $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))

gpu-check:
	@$(HERE) -c "import torch" 2>/dev/null || { echo "error: $(HERE) has no torch: make test makes .venv with it, or name another by PYTHON=" >&2; exit 1; }
	@PYTHONPATH="$(CURDIR)/.dev$(if $(PYTHONPATH),:$(PYTHONPATH))" $(HERE) -m textlock.bench.suite --on gpu $(ARGS)

bench: $(VENV)/.installed-test
	$(RUN) -m textlock.bench.suite --on cpu $(ARGS)

# The figures of README.md and bench/RESULTS.md and their plots, from the files of figures.
report: $(VENV)/.installed-test
	$(RUN) -m textlock.bench.readme

# The stamp is newer than what decides the environment, or the environment is made again. The second Triton is the
# oldest supported one: the tests compile every kernel with both.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[gpu,test,bench,mteb,onnx,peers,tensorboard]'
	rm -rf $(VENV)/triton-3.6
	$(RUN) -m pip install --quiet --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
