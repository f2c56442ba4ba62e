# Everything a person runs, by name. `make help` lists it.

CARGO ?= cargo
TOOLS := .tools
PYTHON ?= python3
soak: N ?= 10000

.DEFAULT_GOAL := help
.PHONY: help demo test simulate fuzz soak lint bench evaluate audit tools

help: ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: tools ## Build, then draw out/demo.png: unsteered and steered pairs with their score curves.
	$(CARGO) run --release --locked --quiet --package fairlead -- demo --out out/demo.png

test: tools ## Run every test.
	scripts/test.sh

simulate: ## Run the cluster in a simulation: SEEDS=5000 FROM=0 many runs, SEED=123 one with its history.
	$(CARGO) test --locked --quiet --package fairlead-coordinator --lib simulation:: -- --nocapture \
		$(if $(SEED),--ignored --exact simulation::one_seed)

fuzz: tools ## Feed spoiled files and messages to every decoder. SECONDS=60 each.
	FUZZ_SECONDS=$(or $(SECONDS),60) $(CARGO) test --locked --workspace --lib --bins --tests spoiled

soak: tools ## Harm a real cluster at random while it makes images; nothing may be lost or differ. N=10000 SEED=1.
	$(CARGO) build --release --locked --quiet --package fairlead
	$(CARGO) run --release --locked --quiet --package fairlead-tests --bin soak -- --images $(N) $(if $(SEED),--seed $(SEED))

lint: tools ## Check formatting, clippy, dependencies and the contract.
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" cargo-deny --locked check licenses bans sources
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" buf lint

bench: tools ## Time clusters, and layers beside torch (FAIRLEAD_PYTHON has it). ONLY=cluster, cluster-calls, vae, ...
	$(CARGO) build --release --locked --quiet --package fairlead
	$(CARGO) run --release --locked --quiet --package fairlead-bench -- $(ONLY)

evaluate: tools ## Measure steering in every cell of EVALUATION.md; hours. N=20 CELLS=emojiland-sd-both: minutes.
	$(CARGO) build --release --locked --quiet --package fairlead
	scripts/evaluate.sh

audit: tools ## Check dependencies against the RustSec advisories (needs the internet).
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" cargo-deny --locked check advisories

tools: ## Install what is missing, or say what to run.
	@PYTHON="$(PYTHON)" scripts/tools.sh $(TOOLS)
