# PrefixCap: `make demo` shows the whole trade, `make app` starts a web page with its models, `make test` runs the tests. All of them set
# up .venv first (about three minutes, once).

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo demo-audio real app test test-slow bench lint clean

setup: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d found, 3.11 or later needed: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "setting up .venv from requirements.txt (about three minutes)"
	@$(PYTHON) -m venv .venv
	@$(PYTHON) .ci/install.py $(BIN)/python requirements.txt
	@touch $(READY)

# Threads that wait without spinning: where something else runs beside, two spinning ones slow each other down several times over.
demo demo-audio real app test test-slow: export OMP_WAIT_POLICY ?= passive

demo: $(READY)
	@$(BIN)/python -m demo.run

demo-audio: $(READY)
	@$(BIN)/python -m demo.run_audio

app: $(READY)
	@$(BIN)/python app.py

# make real PHOTOS=FOLDER trains on photographs; without PHOTOS it shows what was trained before.
real: $(READY)
	@$(BIN)/python -m demo.real $(if $(PHOTOS),--photos "$(PHOTOS)")

# Two processes of one thread each: the tests' models are too small for more.
test: export OMP_NUM_THREADS ?= 1
test: $(READY)
	@$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --max-worker-restart 0

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow

bench: $(READY)
	@$(BIN)/python -m benchmarks.run

lint: $(READY)
	@$(BIN)/ruff check .

clean:
	rm -rf .venv data/demo data/demo_audio .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
