PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: audit bench card clean demo dist docs found-circuits fuzz install lint models-table simulate test \
	test-elsewhere test-llamacpp test-oldest test-pythons test-tl3 types unit

install: $(STAMP)

# steering-vectors and repeng are the outside oracles of the tests. They ask for transformers < 5 but
# run beside the newer one, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt tests/oracles.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/oracles.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/steerlens recommend --model smollm2-135m-instruct --pairs sentiment --out runs/recommend
	$(BIN)/steerlens sweep --model smollm2-135m-instruct --pairs sentiment --max-pairs 16 \
		--layers all --coefficients=-20,-10,0,10,20 --method mean_diff --out runs/demo

# README's picture of an answer, as the report of that run shows it; with Chromium.
card: $(STAMP)
	$(BIN)/python docs/draw_card.py runs/recommend

# Other tools on the same cells, and the boundary against brute force: more than an hour on 2 cores.
# Tools that clash with ours get environments of their own under build/bench.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-r tests/benchmarks/requirements.txt
	$(BIN)/python tests/benchmarks/bench.py --out build/bench
	$(BIN)/python tests/benchmarks/boundary.py --out build/bench
	$(BIN)/python tests/benchmarks/gradients.py
	$(BIN)/python tests/benchmarks/circuits.py
	$(BIN)/python tests/benchmarks/generation.py

# Coverage of the intervals and errors of the tests, simulated, and recommendations of labels that mean
# nothing: some 6 minutes.
simulate: $(STAMP)
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python tests/simulations/inference.py > build/simulations.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/simulations/recommend.py >> build/simulations.md
	mv build/simulations.md docs/simulations.md

# What docs/found-circuits.md holds; on 2 cores hours, on a GPU minutes. FOUND is a folder of that run.
FOUND := build/found-circuits
found-circuits: $(STAMP)
	test -f $(FOUND)/run.json || $(BIN)/steerlens circuits --layer 12 --coefficient 20 --max-pairs 80 \
		--out $(FOUND)
	$(BIN)/python docs/found_circuits.py $(FOUND)

# Our vectors in llama.cpp itself, built from source in an environment of its own: some 10 minutes.
LLAMACPP := build/llamacpp
test-llamacpp: $(STAMP)
	test -x $(LLAMACPP)/bin/python || $(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet --disable-pip-version-check cmake ninja
	$(LLAMACPP)/bin/python -m pip install --quiet --disable-pip-version-check \
		-r tests/llamacpp/requirements.txt
	$(BIN)/python tests/llamacpp/compare.py --client $(LLAMACPP)/bin/python

# Our vectors in lm-evaluation-harness, PEFT and Inspect, in an environment of their own, and in repeng
# and steering-vectors, which ask for an older transformers, in another.
ELSEWHERE := build/elsewhere
test-elsewhere: $(STAMP)
	test -x $(ELSEWHERE)/bin/python || $(PYTHON) -m venv $(ELSEWHERE)
	$(ELSEWHERE)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e . -r tests/elsewhere/requirements.txt
	test -x $(ELSEWHERE)-older/bin/python || $(PYTHON) -m venv $(ELSEWHERE)-older
	$(ELSEWHERE)-older/bin/python -m pip install --quiet --disable-pip-version-check \
		-r tests/elsewhere/older.txt
	$(BIN)/python tests/elsewhere/compare.py --client $(ELSEWHERE)/bin/python \
		--older $(ELSEWHERE)-older/bin/python

# The core on TransformerLens 3 (HookedTransformer), in an environment of its own, and its tables beside
# those of TransformerLens 4.
TL3 := build/tl3
TL3_TESTS := activations boundary directions engine generation hooks loss positions processing sweep
test-tl3: $(STAMP) $(TL3)/.installed
	$(BIN)/python tests/tl3/tables.py $(TL3)/tables
	OMP_NUM_THREADS=1 STEERLENS_BRIDGE_TABLES=$(TL3)/tables $(TL3)/bin/python -m pytest \
		-n 2 --dist loadfile $(TL3_TESTS:%=tests/test_%.py) tests/tl3

$(TL3)/.installed: pyproject.toml tests/tl3/constraints.txt
	test -x $(TL3)/bin/python || $(PYTHON) -m venv $(TL3)
	$(TL3)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c tests/tl3/constraints.txt -e . beartype hypothesis pytest pytest-xdist
	touch $(TL3)/.installed

# The core on the oldest versions that pyproject.toml allows, in an environment of its own. Shapes are
# not checked: the plugin of that jaxtyping does not start after tests/conftest.py.
OLDEST := build/oldest
CORE_TESTS := activations boundary choices cli data directions engine figures hooks hostile loss plots positions report \
	stats sweep tables
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -o addopts="--strict-markers -ra" -m "not real" \
		$(CORE_TESTS:%=tests/test_%.py)

$(OLDEST)/.installed: pyproject.toml tests/oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c tests/oldest.txt -e . beartype hypothesis pytest
	touch $(OLDEST)/.installed

# The core on the other Pythons that are allowed, of those that are here (on the path, or of pyenv), each in an
# environment of its own, after all files were compiled with it.
PYTHONS ?= 3.10 3.12 3.13
test-pythons: $(PYTHONS:%=test-on-%)

test-on-%:
	@python=$$(for found in python$* $$(pyenv root 2>/dev/null)/versions/$*.*/bin/python; do \
		$$found -c "" 2>/dev/null && echo $$found && break; done); \
	if [ -z "$$python" ]; then echo "Python $* is not here: nothing was run on it"; exit 0; fi; \
	set -ex; \
	$$python -W error -m compileall -q -f conftest.py docs steerlens tests; \
	test -x build/python$*/bin/python || $$python -m venv build/python$*; \
	build/python$*/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e . beartype hypothesis pytest; \
	OMP_NUM_THREADS=1 build/python$*/bin/python -m pytest -o addopts="--strict-markers -ra" -m "not real" \
		$(CORE_TESTS:%=tests/test_%.py)

# Known vulnerabilities of the versions in constraints.txt, as PyPI knows them.
AUDIT := build/audit
audit:
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# The readers of files, 200,000 inputs a kind, with atheris in an environment of its own, at low priority:
# FUZZ_JOBS kinds at once, the inputs of each from FUZZ_SHARDS processes with seeds and corpora of their own.
FUZZ := build/fuzz
FUZZ_KINDS := pairs items vectors vector_records ggufs records csvs pages
FUZZ_JOBS ?= 1
FUZZ_SHARDS ?= 1
FUZZ_FOLDERS = $(foreach kind,$(FUZZ_KINDS),$(addprefix $(FUZZ)/$(kind)/,$(shell seq $(FUZZ_SHARDS))))
fuzz: $(STAMP)
	test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/python -m pip install --quiet --disable-pip-version-check \
		-r tests/fuzz/requirements.txt
	printf '%s\n' $(FUZZ_FOLDERS) | \
		PYTHONPATH="$(CURDIR):$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages)" nice -n 15 \
		xargs -P $$(($(FUZZ_JOBS) * $(FUZZ_SHARDS))) -I{} sh -c '$(FUZZ)/bin/python tests/fuzz/readers.py \
			$$(basename $$(dirname {})) {} -seed=$$(basename {}) -runs=$$((200000 / $(FUZZ_SHARDS))) \
			-max_len=4096 -timeout=10 -rss_limit_mb=4096 -artifact_prefix={}/ || exit 255'
	$(BIN)/python tests/fuzz/outcomes.py $(FUZZ_FOLDERS)

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Two workers of one thread each: threads that wait for each other would take the other's time.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbmake --nbmake-timeout=900 tutorials
	$(BIN)/python -m pytest --doctest-modules steerlens

# The sdist and the wheel made from it, into dist, and that wheel at work in an environment that holds
# nothing else, away from the repository.
DIST := build/dist
dist: $(STAMP)
	rm -rf dist $(DIST)
	$(PYTHON) -m venv $(DIST)/tools
	$(DIST)/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
	$(DIST)/tools/bin/python -m build --outdir dist
	$(DIST)/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(DIST)/empty
	$(DIST)/empty/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	STEERLENS_INSTALLED=$(CURDIR)/$(DIST)/empty/bin/steerlens \
		$(BIN)/python -m pytest tests/test_packaging.py -m "not real"

# What works on which architecture, found by running it, into docs/models.md.
models-table: $(STAMP)
	$(BIN)/python tests/models_table.py

# The site, into build/site: without a network, warnings are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
