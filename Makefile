# Everything a newcomer and the CI call. `make help` lists the targets.
# What is slow to make (cargo's target folder, the lab's images) is kept in $(CACHE).

SHELL := /bin/bash
CACHE := $(or $(DROVER_CACHE),$(HOME)/.cache/drover)
export DROVER_CACHE := $(CACHE)
export CARGO_TARGET_DIR ?= $(CACHE)/target
export PATH := $(HOME)/.cargo/bin:$(CACHE)/tools/bin:$(PATH)
BIN := $(CARGO_TARGET_DIR)/debug
LAB := $(BIN)/drover-lab

.DEFAULT_GOAL := help
.PHONY: help setup build image test demo bench-migration bench-disk bench-boot lab-up lab-down lint fmt

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what building and the lab need (Debian 12 or 13, as root)
	@scripts/setup

build: setup ## Build all programs
	@echo "==> building (the first time takes long: RocksDB's C++ among others)" >&2
	cargo build --workspace --bins

image: setup ## The Debian 13 image of domains with disks, from the distribution's packages
	cargo build --package drover-e2e --bin drover-lab
	@$(LAB) image

test: setup ## All tests: format, lints, licences, unit tests, simulation, chart, lab
	@scripts/test

demo: build ## Drain a node of its VPSes under load, kill the leader, count what the clients saw (KEEP=1 leaves it running)
	$(LAB) --name demo demo $(if $(KEEP),--keep)

bench-migration: build ## Move a busy guest with Drover and with QEMU in turn: time, pause, ratios (RUNS=10)
	$(LAB) --name bench bench migration $(if $(RUNS),--runs $(RUNS))

bench-disk: build ## fio in a guest on a thin volume with Drover and with QEMU in turn: ratios (RUNS=10)
	$(LAB) --name bench bench disk $(if $(RUNS),--runs $(RUNS))

bench-boot: build ## Boot a guest with Drover and with QEMU's microvm in turn: time, memory, ratios (RUNS=10)
	$(LAB) --name bench bench boot $(if $(RUNS),--runs $(RUNS))

lab-up: build ## Start a lab of three hosts by hand
	$(LAB) up
	@echo "try: $(LAB) status; $(LAB) ssh host1; $(LAB) console host1; $(LAB) cut host1; make lab-down"

lab-down: ## Take down the labs that were started with lab-up or demo KEEP=1
	@for name in lab demo; do $(LAB) --name $$name down; done

lint: setup ## Format check, clippy, licences and sources of dependencies
	@scripts/test lint

fmt: ## Format the code
	cargo fmt --all
