# Each target installs what it needs into .venv, once: `make demo` or `make test` is all that a newcomer types.
PYTHON ?= python3
PY := .venv/bin/python
OLD_PYTHON := '$(PYTHON)' is not Python 3.11 or newer: name one, as in PYTHON=/usr/bin/python3.11 make demo
LOCAL := diffusers/pyproject.toml LLaVA-NeXT/pyproject.toml

.DELETE_ON_ERROR:
.PHONY: help demo demo-dit test lint bench bench-train-options soak nano figures

help:
	@echo "make demo     describe chest X-rays, fine-tune the bundled model on that, evaluate it, 15 minutes"
	@echo "              -> medart/demo.png, medart/evaluation/report.html"
	@echo "QUICK=1 make demo  the same with fewer images and steps, 5 minutes -> results/quick-demo/"
	@echo "make demo-dit a class-conditional DiT on chest X-rays, 6 minutes on 2 cores -> results/demo-dit/demo-dit.png"
	@echo "make test     run the tests"
	@echo "make lint     check style and types"
	@echo "make bench    time Med-Art's and DiT's steps and captioning beside plain baselines; the last line of each is JSON"
	@echo "make bench-train-options  steps per second and memory of train.py's ways to train, beside fast-DiT's table"
	@echo "make soak     the long campaigns: resumes, kills, a step at full size (half an hour; 16 GB of memory)"
	@echo "make nano     train the bundled models in nano/ anew (hours)"
	@echo "make figures  run the demo and copy its picture into img/ for the README"
	@echo "PYTHON=python3.12 make ...  chooses the Python (3.11 or newer) that .venv is made with"

demo: .venv/.installed
	$(PY) nano/demo.py $(if $(QUICK),--quick)

demo-dit: .venv/.installed
	$(PY) nano/demo_dit.py

test: .venv/.installed-dev
	$(PY) -m pytest -q

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath $(PY)

bench: .venv/.installed
	$(PY) benchmarks/medart_step.py
	$(PY) benchmarks/dit.py
	$(PY) benchmarks/vsg.py

bench-train-options: .venv/.installed
	$(PY) benchmarks/train_options_table.py

# -m "" also takes the cases that `make test` has of these campaigns.
soak: .venv/.installed-dev
	$(PY) -m pytest -q -s -m "" tests/test_soak.py
	$(PY) -m pytest -q -s -m slow --ignore=tests/test_soak.py

# Each recipe reads what the one before it wrote.
nano: .venv/.installed
	$(PY) nano/train_text.py
	$(PY) nano/train_vae.py
	$(PY) nano/train_pixart.py
	$(PY) nano/check_pixart.py
	$(PY) nano/train_lora.py
	$(PY) prepare.py dermoscopy-patches
	$(PY) prepare.py histology
	$(PY) nano/train_captioner.py
	$(PY) nano/check_captioner.py

figures: demo
	mkdir -p img
	cp medart/demo.png img/demo.png
	cp results/captions.png img/captions.png

# The stamps are written last, so that an interrupted installation is taken up again.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "$(OLD_PYTHON)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.created requirements.txt $(LOCAL)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
