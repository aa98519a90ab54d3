# Each target installs what it needs into .venv, once: `make demo` or `make test` is all that a newcomer types.
PYTHON ?= python3
PY := .venv/bin/python
OLD_PYTHON := '$(PYTHON)' is not Python 3.11 or newer: name one, as in PYTHON=/usr/bin/python3.11 make demo
LOCAL := diffusers/pyproject.toml LLaVA-NeXT/pyproject.toml

.DELETE_ON_ERROR:
.PHONY: help demo demo-dit app test test-app lint bench bench-train-options soak nano figures ablation ablation-quick tables

help:
	@echo "make demo     describe chest X-rays, fine-tune the bundled model on that, evaluate it, 15 minutes"
	@echo "              -> medart/demo.png, medart/evaluation/report.html"
	@echo "QUICK=1 make demo  the same with fewer images and steps, 5 minutes -> results/quick-demo/"
	@echo "make demo-dit a class-conditional DiT on chest X-rays, 7 minutes on 2 cores -> results/demo-dit/demo-dit.png"
	@echo "make app      the web demo, at http://127.0.0.1:7860"
	@echo "make test     run the tests"
	@echo "make test-app the web demo's tests, which need a Chromium; make test then has them, too"
	@echo "make lint     check style and types"
	@echo "make bench    time Med-Art's and DiT's steps and captioning beside plain baselines; the last line of each is JSON"
	@echo "make bench-train-options  steps per second and memory of train.py's ways to train, beside fast-DiT's table"
	@echo "make soak     the long campaigns: resumes, kills, a step at full size (half an hour; 16 GB of memory)"
	@echo "make nano     train the bundled models in nano/ anew (hours)"
	@echo "make ablation the paper's ablation at bundled scale, hours -> results/ablation (make ablation-quick: 6 minutes)"
	@echo "make tables   put the figures of results/ into README and docs"
	@echo "make figures  draw the pictures of README and docs anew, into img/; half an hour, needs a Chromium"
	@echo "PYTHON=python3.12 make ...  chooses the Python (3.11 or newer) that .venv is made with"

demo: .venv/.installed
	$(PY) nano/demo.py $(if $(QUICK),--quick)

demo-dit: .venv/.installed
	$(PY) nano/demo_dit.py

app: .venv/.installed-app
	$(PY) app.py

test: .venv/.installed-dev
	$(PY) -m pytest -q

test-app: .venv/.installed-app-dev
	$(PY) -m pytest -q tests/test_app.py

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

figures: demo .venv/.installed-app-dev
	$(PY) nano/demo_dit.py --steps 3000 --out results/dit
	cp medart/demo.png results/captions.png results/dit/demo-dit.png img
	$(PY) tests/app_browser.py img

ablation: .venv/.installed
	$(PY) nano/ablation.py

ablation-quick: .venv/.installed
	$(PY) nano/ablation.py --quick

tables: .venv/.installed
	$(PY) nano/tables.py

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

.venv/.installed-app: .venv/.installed requirements-app.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-app.txt
	@touch $@

.venv/.installed-app-dev: .venv/.installed-app .venv/.installed-dev requirements-app-dev.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-app-dev.txt
	@touch $@
