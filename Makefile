# `make demo` and `make test` are all the set-up there is. pip's own settings and environment variables are honoured.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test soak check lint format bench-data bench-pretrain bench-learn bench-serve

demo: $(STAMP)  ## raw text to a served base model, on this machine
	$(BIN)/headwater run tiny
	$(BIN)/headwater serve tiny --trial

test: $(STAMP)  ## every test, the slow ones included
	$(BIN)/python -m pytest

soak: $(STAMP)  ## every stage with every fault, pretraining with many of them and for 10,000 steps, the service for 24,000 requests; two hours or so, not timed whole
	$(BIN)/python -m pytest -m soak

check: lint  ## format, lint, types, fast tests
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(STAMP)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-data: $(STAMP)  ## data preparation against its peers, about an hour; runs/bench/data.json
	$(BIN)/python -m tests.bench.data

bench-pretrain: $(STAMP)  ## pretraining against its peers, about three hours; runs/bench/pretrain.json
	$(BIN)/python -m tests.bench.pretrain

bench-learn: $(STAMP)  ## what pretraining learns, against a plain loop, seven trainings; runs/bench/learn.json
	$(BIN)/python -m tests.bench.learn

bench-serve: $(STAMP)  ## generation against its peers, not timed whole; runs/bench/serve.json
	$(BIN)/python -m tests.bench.serve

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@
