PYTHON ?= python3
BIN := .venv/bin

# By pip, as some machines have a CPU build of it that only pip is told of.
TORCH := torch==2.13.0

# uv installs several times as fast as pip, which is used where uv does not find a package.
install = $(BIN)/uv pip install --quiet --python $(1)/bin/python $(2) || \
	$(1)/bin/python -m pip install --quiet --no-compile $(2)

.PHONY: test demo lint types unit transformers4 bare site fix clean

test: .venv/installed  ## everything that CI runs; at once what takes one core
	$(MAKE) --jobs=2 lint types site .venv-transformers4/installed
	$(MAKE) unit transformers4 bare

demo: .venv/installed  ## merge the tiny LLaMAs with every method, print a table, draw the chart
	$(BIN)/python examples/demo.py

lint: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: .venv/installed
	$(BIN)/mypy

unit: .venv/installed  ## all tests, with transformers 5
	$(BIN)/pytest -n auto --dist worksteal

transformers4: .venv-transformers4/installed  ## what loads results, with transformers 4
	.venv-transformers4/bin/pytest -n auto --dist worksteal tests/test_loads.py tests/test_model_companions.py \
		tests/test_in_memory.py tests/test_tiny_llamas.py tests/test_lora_parity.py \
		tests/test_inference.py

# Only what a user gets: development packages hide a missing requirement.
bare: .venv/installed
	rm -rf .venv-bare && $(PYTHON) -m venv .venv-bare
	.venv-bare/bin/pip install --quiet --no-compile $(TORCH)
	$(call install,.venv-bare,.)
	cd .venv-bare && for command in bin/*-llama bin/llama-*; do \
		$$command --help > /dev/null || exit 1; done
	cd .venv-bare && bin/ties-llama ../examples/tiny_llamas/base --save merged --ft_models \
		../examples/tiny_llamas/capitals ../examples/tiny_llamas/elements
	cd .venv-bare && bin/python -c "from model_utils import get_llama; get_llama('merged')"
	.venv-bare/bin/llama-merge examples/recipes/stages.yml .venv-bare/stages
	rm -rf .venv-bare

# With --quiet, --strict would count no warnings.
site: .venv/installed  ## the documentation, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

fix: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile $(TORCH) uv==0.13.9
	$(call install,.venv,--editable '.[dev]')
	touch $@

.venv-transformers4/installed: tests/requirements-transformers4.txt .venv/installed
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/pip install --quiet --no-compile $(TORCH)
	$(call install,.venv-transformers4,-r tests/requirements-transformers4.txt)
	touch $@

clean:
	rm -rf .venv .venv-bare .venv-transformers4 build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
