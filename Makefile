# make lab    opens the course          make test   runs everything
# Each builds .venv first, once. PYTHON=python3.12 make … picks another Python.

PYTHON ?= python3
# The PyTorch that was tested. One that is in .venv already, say a build without CUDA, stays.
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed
SITE_STAMP := .venv/.site
NOTEBOOKS := $(sort $(wildcard nbs/*.ipynb nbs/*/*.ipynb nbs/*/*/*.ipynb))
# JupyterLab refuses to run as root unless it is told to.
LAB_FLAGS ?= $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help lab exercises test test-long check benchmark ladder textmodel notebooks export site site-open site-test constraints clean

help:
	@echo "make lab          open JupyterLab at the first notebook"
	@echo "make exercises    write exercises/, the edition with blanks, if it isn't there; open it"
	@echo "make test         check the exports, run every notebook and the test suite"
	@echo "make test-long    the suite with what costs more: 10,000 requests, Firefox, the site, every exercise in nbgrader"
	@echo "make benchmark    measure this machine; rewrites benchmark_results.txt"
	@echo "make ladder       measure the fast GPT beside its peers; writes ladder_results/"
	@echo "make textmodel    train the kept model of text again, on the course's prose as it is now"
	@echo "make notebooks    run all notebooks in place, with their outputs, and clean them"
	@echo "make export       write kvcache_lib/ from the notebooks"
	@echo "make site         build the site, build/site/html; site-open shows it, site-test looks at every page"
	@echo "make constraints  resolve the versions in constraints.txt anew"
	@echo "make clean        remove .venv and what was built"

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or newer is needed; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 …" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Trusted, our own notebooks step without a kernel; JupyterLab strips scripts from what it does not know.
lab: $(STAMP)
	@$(BIN)/jupyter trust $(NOTEBOOKS) >/dev/null
	$(BIN)/jupyter lab $(LAB_FLAGS) nbs/00_named_tensors.ipynb

# What is there is the learner's: it is opened, never written over.
exercises: $(STAMP)
	test -e exercises || $(BIN)/kvcache-exercises exercises
	cd exercises && ../$(BIN)/jupyter lab $(LAB_FLAGS) 00_named_tensors.ipynb

# The exports come first: a stale module would make everything after it puzzling.
check: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_exports.py

# The exports were looked at by then. One thread a process: two processes with two threads each would wait for each other on two cores.
test: export OMP_NUM_THREADS = 1
test: check
	KVCACHE_QUICK=1 $(BIN)/nbdev_test
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --ignore tests/test_exports.py

test-long: export OMP_NUM_THREADS = 1
test-long: $(STAMP)
	KVCACHE_LONG=1 KVCACHE_EXAMPLES=1500 CALLS=6000 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

benchmark: $(STAMP)
	$(BIN)/kvcache-benchmark

ladder: $(STAMP)
	$(BIN)/kvcache-benchmark --ladder

textmodel: $(STAMP)
	$(BIN)/python -m kvcache_lib.kept

# No progress bars in what is committed: they hold times. Widgets leave pictures, not their random ids.
notebooks: $(STAMP)
	KVCACHE_STATIC=1 TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.store_widget_state=False \
	  --KernelManager.transport_encryption=auto $(NOTEBOOKS)
	$(BIN)/nbdev_clean

export: $(STAMP)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

$(SITE_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[site]'
	@touch $@

site: $(SITE_STAMP)
	$(BIN)/python docs/site/build.py

site-open: site
	$(BIN)/python -m webbrowser "file://$(CURDIR)/build/site/html/index.html"

site-test: site
	KVCACHE_SITE=build/site/html $(BIN)/python -m pytest -q tests/test_site.py

constraints: $(STAMP)
	$(BIN)/python -m pip install -q uv
	{ sed '/^[^#]/,$$d' constraints.txt; $(BIN)/uv pip compile -q --universal --python-version 3.10 \
	  --no-header --no-annotate --extra dev --extra peers --extra site --extra teach setup.py | grep -v -E '^(torch|nvidia-.*|cuda-.*|triton.*)=='; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis
