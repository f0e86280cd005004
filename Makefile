# A fresh machine needs git, make and a Rust toolchain. Plain rules: any make, any shell.
.POSIX:
.SUFFIXES:
.PHONY: help run test torture install verify fmt clippy docs fix bench deps

# One target directory for all checkouts and one profile for everything, so that RocksDB is compiled once.
TARGET = $${CARGO_TARGET_DIR:-$$HOME/.cache/holdfast-target}
CARGO = CARGO_TARGET_DIR="$(TARGET)" cargo
# The same features everywhere, or cargo would build the crates again.
ALL = --locked --release --workspace --features holdfast-client/cli
MEMORY = --locked --release --workspace --no-default-features --features holdfast-client/cli

help:
	@echo "make run       a cluster of three in one process, with a demo upstream"
	@echo "make test      all tests"
	@echo "make torture   the promises that break a cluster over and over, for much longer"
	@echo "make install   holdfast and holdfastd into cargo's bin directory"
	@echo "make verify    what a change must pass: format, lints, docs, tests; changes nothing"
	@echo "make fix       formats and applies what clippy can; the only target that rewrites files"
	@echo "make bench     writes and reads a second of three processes, and what the memory tier costs"
	@echo "make deps      what the build needs, installed when root, named when not"

run: deps
	@$(CARGO) build $(ALL) --bin holdfast --bin holdfastd
	@exec "$(TARGET)/release/holdfastd" dev --nodes 3

test: deps
	@$(CARGO) test $(ALL) --no-fail-fast

# A failure names the seed that repeats it.
torture: deps
	@HOLDFAST_CYCLES=$${HOLDFAST_CYCLES:-200} $(CARGO) test $(ALL) --no-fail-fast --test promises -- \
	a_frozen_leader p9_ p1_acknowledged_write_survives

install: deps
	@$(CARGO) build $(ALL) --bin holdfast --bin holdfastd
	@bin="$${CARGO_INSTALL_ROOT:-$${CARGO_HOME:-$$HOME/.cargo}}/bin"; mkdir -p "$$bin" && \
	install -m 755 "$(TARGET)/release/holdfast" "$(TARGET)/release/holdfastd" "$$bin" && echo "holdfast and holdfastd are in $$bin."

verify: fmt clippy docs test

fmt:
	@cargo fmt --all --check

clippy: deps
	@$(CARGO) clippy $(ALL) --all-targets -- -D warnings
	@$(CARGO) clippy $(MEMORY) --all-targets -- -D warnings

docs: deps
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(ALL) --no-deps --document-private-items

fix: deps
	@$(CARGO) clippy --fix --allow-dirty --allow-staged --release --workspace --features holdfast-client/cli --all-targets
	@cargo fmt --all

bench: deps
	@$(CARGO) bench --profile release --locked --workspace --features holdfast-client/cli --bench load
	@$(CARGO) run $(ALL) --package holdfast-raft --example memory

deps:
	@sh .ci/prepare
