# Two commands do all set-up: `make demo` and `make test`. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
.PHONY: help demo test sim faults load bench bench-peers mutants fuzz lint setup cargo-deny cargo-mutants

CARGO ?= cargo
CARGO_DENY_VERSION := 0.18.3
CARGO_MUTANTS_VERSION := 27.1.0
# What `make mutants` changes, and what percentage of it tests must notice.
CRATES ?= pages codec postcopy protocol overcommit
MUTANTS_PERCENT := 90
PACKAGES := build-essential libclang-dev

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## Move a busy guest between two processes here, and print the report
	@$(CARGO) build --release --locked -p ferry
	@target="$${CARGO_TARGET_DIR:-target}"; "$$target/release/ferry" demo

# Bash reads line by line; an awk may hold back what came for minutes.
test: setup ## Run every test; what cannot run here is listed as SKIP at the end
	@$(CARGO) test --workspace --locked -- --show-output 2>&1 | { \
		quiet=; skipped=(); \
		while IFS= read -r line || [ -n "$$line" ]; do \
			case $$line in \
				successes:) quiet=1;; \
				failures: | "test result:"*) quiet=;; \
				"---- "*" stdout ----") name=$${line#---- } name=$${name%% *};; \
				"SKIP: "*) skipped+=("SKIP $$name: $${line#SKIP: }");; \
			esac; \
			[ -n "$$quiet" ] || printf '%s\n' "$$line"; \
		done; \
		for line in "$${skipped[@]}"; do printf '%s\n' "$$line"; done; }

sim: setup ## Run the protocol in virtual time: SEEDS=100000 FROM=0; SEED=n replays one and shows all of it
	@$(CARGO) run --release --locked --quiet -p ferry-sim -- \
		$(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),100000) --from $(or $(FROM),0)) $(if $(PLANT),--plant $(PLANT))

faults: setup ## Run every row of docs/FAULTS.md with both guests: five to ten minutes, as root
	@$(CARGO) test --locked -p ferry-faults -- --include-ignored --nocapture

load: setup ## Move one machine 200 times there and back, and many at once
	@FERRY_TRIPS=200 $(CARGO) test --locked -p ferry-e2e --test all -- load:: --nocapture --test-threads 1

bench: setup ## Run the benchmarks: ratios measured in one run
	@$(CARGO) run --release --locked -p ferry-bench

# What was measured of this commit is not measured again: an interrupted run goes on.
bench-peers: setup ## Run Ferry and QEMU side by side, as root: CASES=idle,fast LINKS=1g REPEATS=5; QUICK=1: some minutes
	@out="$${CARGO_TARGET_DIR:-target}"; mkdir -p "$$out/peers"; \
	results="$$out/peers/$$(git describe --always --dirty --abbrev=12)$(if $(QUICK),-quick).jsonl"; \
	$(CARGO) build --release --locked -p ferry -p ferry-bench; \
	"$$out/release/ferry-peers" run --tree "$$out/peers/trixie" --results "$$results" $(if $(QUICK),--quick) \
		$(if $(CASES),--cases $(CASES)) $(if $(LINKS),--links $(LINKS)) $(if $(REPEATS),--repeats $(REPEATS)); \
	"$$out/release/ferry-peers" table "$$results" $(if $(NOTE),--note "$(NOTE)")

# A timeout is a mutant that was caught; one that does not compile does not count. The protocol's rules are
# for a good part tested where two sides meet.
mutants: setup cargo-mutants ## Change the pure crates in every small way: do the tests notice? (hours; CRATES=pages: one crate)
	@out="$${CARGO_TARGET_DIR:-target}/mutants"; \
	for crate in $(CRATES); do \
		case $$crate in protocol) tests=(--test-package ferry-protocol --test-package ferry-sim);; *) tests=();; esac; \
		mkdir -p "$$out/$$crate"; \
		CARGO_PROFILE_DEV_DEBUG=false $(CARGO) mutants --package "ferry-$$crate" "$${tests[@]}" \
			--output "$$out/$$crate" --no-shuffle --colors never || [ $$? = 2 ] || [ $$? = 3 ]; \
	done; \
	count() { cat "$${@/#/$$out/$$crate/mutants.out/}" | wc -l; }; \
	printf '\n%-12s %8s %8s %8s\n' crate caught missed percent; \
	for crate in $(CRATES); do \
		echo "$$crate" "$$(count caught.txt timeout.txt)" "$$(count missed.txt)"; \
	done | awk -v least=$(MUTANTS_PERCENT) ' \
		{ percent = 100 * $$2 / ($$2 + $$3); printf "%-12s %8d %8d %8.1f\n", $$1, $$2, $$3, percent } \
		percent < least { few = few " " $$1 } \
		END { if (few) { print "fewer than " least " % were caught:" few; exit 1 } }'

# Not in the environment: bash counts in a variable of that name.
unexport SECONDS
SECONDS := 60
fuzz: setup ## Fuzz every target for SECONDS=60 each; KEEP=1 adds to the corpora, which `make test` replays
	@tests/fuzz/run $(SECONDS) $(TARGETS)

lint: setup cargo-deny ## Check formatting, lints, documentation, licences and dependencies
	$(CARGO) fmt --all --check
	rustfmt --check --edition 2024 tools/guest/kernel/main.rs
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked
	$(CARGO) deny --locked check --hide-inclusion-graph licenses bans sources

# Says what is missing; installs it where that is possible without asking for a password.
setup:
	@command -v $(CARGO) >/dev/null || { \
		echo "cargo is missing: install Rust 1.95 or newer, open a new shell, and try again" >&2; exit 1; }
	@compiler() { echo '#include <linux/userfaultfd.h>' | cc -E - >/dev/null 2>&1; }; \
	libclang() { [ -n "$$LIBCLANG_PATH" ] \
		|| grep -q 'libclang[-.0-9]*\.so' <<<"$$(PATH="$$PATH:/sbin" ldconfig -p 2>/dev/null)" \
		|| compgen -G '/usr/lib/llvm-*/lib/libclang*.so' >/dev/null || compgen -G '/usr/lib64/libclang*.so' >/dev/null; }; \
	ready() { compiler && libclang; }; \
	if ! ready; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing $(PACKAGES)"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(PACKAGES); \
		fi; \
		ready || { \
			echo "A C compiler, the kernel's headers or libclang are missing. On Debian or Ubuntu:" >&2; \
			echo "  sudo apt-get install $(PACKAGES)" >&2; \
			echo "On Fedora:" >&2; \
			echo "  sudo dnf install gcc kernel-headers clang-devel" >&2; \
			exit 1; }; \
	fi

# Unoptimised: it builds much faster, and the check takes seconds anyway.
cargo-deny:
	@$(CARGO) deny --version >/dev/null 2>&1 || { \
		echo "Installing cargo-deny $(CARGO_DENY_VERSION) (some minutes, once)"; \
		CARGO_PROFILE_DEV_DEBUG=false $(CARGO) install cargo-deny --locked --version $(CARGO_DENY_VERSION) \
			--no-default-features --debug; }

cargo-mutants:
	@$(CARGO) mutants --version >/dev/null 2>&1 || { \
		echo "Installing cargo-mutants $(CARGO_MUTANTS_VERSION) (some minutes, once)"; \
		CARGO_PROFILE_DEV_DEBUG=false $(CARGO) install cargo-mutants --locked --version $(CARGO_MUTANTS_VERSION) --debug; }
