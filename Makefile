# make demo   cut the built-in model, verify it, let it write a line; heal it with Axolotl, merge; compare, write the card
# make test   all tests: first the core without torch, then everything
# make lint   ruff and mypy          make bench   the figures of the README
# Each sets up what it needs in .venv (and .venv-light) from nothing.

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check
SOURCES = pyproject.toml constraints.txt

.PHONY: demo test lint bench clean

demo: .venv/all
	rm -rf build/demo-9L build/healed build/report
	.venv/bin/downcycle --src demo --keep 9 --out build/demo-9L
	.venv/bin/downcycle verify build/demo-9L --src demo
	.venv/bin/python -W ignore recipes/demo/write_line.py build/demo-9L "The function returns"
	.venv/bin/downcycle demo --out build/healed
	.venv/bin/downcycle eval demo build/demo-9L build/healed/healed --tasks quick --limit 100 --report build/report
	.venv/bin/downcycle card build/healed/healed
	.venv/bin/downcycle push build/healed/healed you/demo-healed --dry-run

test: .venv-light/test .venv/all
	.venv-light/bin/python -m pytest -q
	.venv/bin/python -m pytest -q -n 2

lint: .venv/all
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/all .venv-light/test
	.venv/bin/python tests/benchmarks/cut.py --light .venv-light/bin/downcycle $(BENCH)
	.venv/bin/python tests/benchmarks/merge.py --axolotl .venv/bin/axolotl
	.venv/bin/python tests/benchmarks/data.py
	.venv/bin/python tests/benchmarks/evaluate.py
	.venv/bin/python tests/benchmarks/score.py
	.venv/bin/python tests/benchmarks/ternary.py

clean:
	rm -rf .venv .venv-light build *.egg-info

.venv/all: $(SOURCES)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --requirement constraints.txt
	.venv/bin/python $(PIP) --constraint constraints.txt --editable '.[all,test,lint]'
	touch $@

.venv-light/test: $(SOURCES)
	test -x .venv-light/bin/python || $(PYTHON) -m venv .venv-light
	.venv-light/bin/python $(PIP) --editable . pytest safetensors
	touch $@
