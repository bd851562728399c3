# `make help` lists the targets. Downloads, guest kernels and the lab are kept in $NUTSHELL_CACHE
# (~/.cache/nutshell), which `make clean` leaves.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
NUTSHELL_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/nutshell
export CARGO_TARGET_DIR NUTSHELL_CACHE

NAME := containerd-shim-nutshell-v2
TARGET := x86_64-unknown-linux-gnu
# LINKED is the executable that cargo links. SHIM is the same with the guest's kernels and initramfs embedded.
LINKED := $(CARGO_TARGET_DIR)/$(TARGET)/release/$(NAME)
SHIM := $(CARGO_TARGET_DIR)/nutshell/$(NAME)
AGENT_PATH := $(CARGO_TARGET_DIR)/guest/agent.path
INITRAMFS := $(CARGO_TARGET_DIR)/guest/initramfs.cpio
KERNEL_PATH := $(CARGO_TARGET_DIR)/guest/kernel.path
DISK_READER_KERNEL_PATH := $(CARGO_TARGET_DIR)/guest/disk-reader-kernel.path
PACKAGES := bc bison build-essential busybox-static flex iproute2 libcap-ng-dev libelf-dev libseccomp-dev libssl-dev perl xz-utils
# For the unit tests: acpica-tools and dmidecode read firmware tables, dosfstools and mtools read FAT file systems,
# qemu-utils makes disk images, and systemd (systemd-analyze) checks the unit of the agent's service.
UNIT_PACKAGES := acpica-tools dmidecode dosfstools mtools qemu-utils systemd

# The suite for disks of other distributions. It runs only if NUTSHELL_TEST_DISKS names a folder with such disks
# (CONTRIBUTING.md).
DISK_SUITES := $(if $(NUTSHELL_TEST_DISKS),vms-disks-2.1)
# Left to `make soak`: suites that repeat others in another configuration (containerd 1.7, containerd's Sandbox service,
# disks), suites that take long, and `lab`, which tests the lab itself.
SOAK_SUITES := containers-1.7 deploy-1.7 docker failures-1.7 hostile-2.1 lab leaks pods-1.7 pods-disk-2.1 pods-shim-2.1 \
	pods-shim-all-2.1 pods-vm-all-2.1 snapshotters-2.1 storage-2.1 streams-1.7 vms-all-2.1 vms-distribution-2.1 \
	$(DISK_SUITES)
SUITES := $(filter-out $(SOAK_SUITES) vms-disks-2.1,$(sort $(patsubst tests/suites/%.sh,%,$(wildcard tests/suites/*.sh))))

# The suites that `make soak` also runs on the PC board.
PC_SUITES := containers-2.1 disks network pods-2.1 pods-disk-2.1 streams-2.1

PHASE := tools/phase
SUBMAKE := $(MAKE) --no-print-directory

# Linked statically: the executable must run on hosts without these libraries.
export LIBSECCOMP_LINK_TYPE := static
export LIBCAPNG_LINK_TYPE := static
export LIBSECCOMP_LIB_PATH := /usr/lib/x86_64-linux-gnu
export LIBCAPNG_LIB_PATH := /usr/lib/x86_64-linux-gnu

.PHONY: help build setup kernel kernel-paths agent executable first-run-downloads install run run-container run-vm test lint lint-clippy lint-format unit \
	fuzz fuzz-coverage suites soak soak-suites soak-pc soak-chaos bench dist clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## /  make \1\t/p' Makefile | expand -t 20

run: ## set everything up, then run a container in its own VM
	@$(PHASE) -p "make run" $(SUBMAKE) EXTRA_TARGETS=first-run-downloads build run-container

run-vm: build ## build a small disk image, then boot it as a virtual machine
	@$(PHASE) "first virtual machine" "2 minutes" tests/lab/first-run $(SHIM) vm

build: setup ## build the executable, with guest kernel and initramfs inside
	@$(PHASE) "build (in parallel)" "11 minutes on two cores, seconds when little changed" \
		$(SUBMAKE) -j$(shell nproc) kernel executable $(EXTRA_TARGETS)
	@tools/embed-guest $(LINKED) "$$(cat $(KERNEL_PATH))" "$$(cat $(DISK_READER_KERNEL_PATH))" $(INITRAMFS) \
		"$$(command -v busybox)" $(SHIM)

install: ## copy the built executable to $(DESTDIR)$(PREFIX)/bin
	@test -x $(SHIM) || { echo "$(SHIM) does not exist: run \`make build\` first" >&2; exit 1; }
	install -D -m 755 $(SHIM) $(DESTDIR)$(PREFIX)/bin/$(NAME)

test: ## run everything that CI runs: lint, unit tests, end-to-end suites
	@printf '%s\n' 'make test runs these steps. Minutes on two cores, if built before and from scratch:' \
		'  lint                    1    7' '  unit tests              3    5' '  build                   1   14' \
		'  deploy tests            1    1' "  agent's tests           2    8" '  kernels on the PC board 2    3' \
		'  end-to-end suites      37   43'
	@$(PHASE) -p "make test" $(SUBMAKE) lint unit suites

lint: setup ## check formatting, clippy, licences, structure
	@$(PHASE) "lint: format" "" $(SUBMAKE) lint-format
	@$(PHASE) "lint: structure" "1 minute, seconds when built before" $(CARGO) run --locked --quiet -p nutshell-structure
	@$(PHASE) "lint: clippy" "2 minutes" $(SUBMAKE) lint-clippy
	@$(PHASE) "lint: licences" "3 minutes, a second when built before" tests/lab/deny check bans licenses sources
	@$(PHASE) "lint: names of tests" "" tests/conformance/names
	@$(PHASE) "lint: lock file of the fuzz targets" "" $(CARGO) fetch --locked --quiet --manifest-path fuzz/Cargo.toml

# Tests that only run in the lab are not in --all-targets.
lint-clippy:
	@$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@$(CARGO) clippy --locked -p nutshell-conformance --test direct -- -D warnings
	@$(CARGO) clippy --locked -p nutshell-agent --test containers --test machine -- -D warnings

lint-format:
	@$(CARGO) fmt --all --check
	@rustfmt --edition 2024 --check tests/images/*.rs tests/hostile/*.rs tests/conformance/programs/*.rs fuzz/fuzz_targets/*.rs

unit: setup ## run the unit tests
	@tests/lab/need $(UNIT_PACKAGES)
	@$(PHASE) "unit tests: build" "3 minutes, from scratch" $(CARGO) test --locked --workspace --no-run
	@$(PHASE) "unit tests" "2 minutes" timeout --verbose 900 $(CARGO) test --locked --workspace

fuzz: setup ## fuzz each parser of untrusted bytes for SECONDS=n (default 60)
	@$(PHASE) "fuzz: $(or $(SECONDS),60) seconds for each target" "5 minutes to build, from scratch" \
		fuzz/run $(or $(SECONDS),60)

fuzz-coverage: setup ## check that the stored inputs of the fuzz targets execute 80 % of the parsers
	@$(PHASE) "fuzz: coverage" "5 minutes to build, from scratch" fuzz/coverage

suites: build ## run the end-to-end suites in the lab
	@$(PHASE) "deploy tests" "1 minute" tests/deploy
	@$(PHASE) "agent's tests in the lab" "2 minutes" guest/agent/tests/run-in-lab
	@$(PHASE) "kernels on the PC board in the lab" "2 minutes" tests/pc/run-in-lab
	@NUTSHELL_TEST_SHIM=$(SHIM) $(PHASE) "end-to-end suites" "37 minutes" tests/run $(SUITES)

soak: build ## run the suites that `make test` leaves out, the PC board's, the fuzz targets and their coverage, and 200 rounds of random kills
	@NUTSHELL_TEST_SHIM=$(SHIM) $(PHASE) -p "make soak" $(SUBMAKE) SECONDS=30 fuzz fuzz-coverage soak-suites soak-pc soak-chaos

soak-suites:
	@NUTSHELL_TEST_LIMIT=$${NUTSHELL_TEST_LIMIT:-1800} $(PHASE) "soak: suites" "90 minutes" tests/run $(SOAK_SUITES)

# Containers on the PC board, and kernels of distributions that reboot repeatedly.
soak-pc:
	@NUTSHELL_TEST_REBOOTS=20 $(PHASE) "soak: kernels on the PC board" "15 minutes" tests/pc/run-in-lab
	@NUTSHELL_TEST_PC_KERNEL="$$(guest/kernel/build --board pc)" $(PHASE) "soak: containers on the PC board" \
		"40 minutes" tests/run $(PC_SUITES)

soak-chaos:
	@NUTSHELL_TEST_ROUNDS=200 NUTSHELL_TEST_DISTURBANCES=1 NUTSHELL_TEST_LIMIT=7200 $(PHASE) \
		"soak: random kills and disturbances" "100 minutes" tests/run failures-2.1

bench: build ## compare with runc and QEMU (docs/BENCHMARKS.md)
	@NUTSHELL_TEST_SHIM=$(SHIM) benches/run

dist: build ## make a release: executable, SBOM, checksums, source offer
	@$(PHASE) "dist" "1 minute" tools/dist $(SHIM) "$$(cat $(KERNEL_PATH))" "$$(cat $(DISK_READER_KERNEL_PATH))"

setup: ## install the Debian packages that a build needs
	@tools/rust
	@tests/lab/need $(PACKAGES)

clean: ## remove the build output of this tree
	$(CARGO) clean

# The commands with a + in the next targets use the job slots of the make that runs them.

# Static, so that it runs on any distribution, and starts without a dynamic linker.
executable: agent
	+@RUSTFLAGS='-C target-feature=+crt-static' $(PHASE) "build: executable" "3 minutes" \
		$(CARGO) build --quiet --locked --release -p nutshell --target $(TARGET)

agent: setup
	@mkdir -p $(dir $(INITRAMFS))
	+@$(PHASE) "build: guest agent" "2 minutes" guest/agent/build >$(AGENT_PATH)
	@guest/image/build "$$(cat $(AGENT_PATH))" $(INITRAMFS)

kernel: setup
	@mkdir -p $(dir $(KERNEL_PATH))
	+@$(PHASE) "build: guest kernels" "11 minutes while cargo builds in parallel" $(SUBMAKE) kernel-paths

# The variant comes first: its build also builds the kernel of containers, with which it shares object files, and puts
# it into the cache.
kernel-paths:
	+@guest/kernel/build --variant disk-reader >$(DISK_READER_KERNEL_PATH).new
	+@guest/kernel/build >$(KERNEL_PATH).new
	@mv $(DISK_READER_KERNEL_PATH).new $(DISK_READER_KERNEL_PATH)
	@mv $(KERNEL_PATH).new $(KERNEL_PATH)

# What the first container needs, fetched while the executable is built.
first-run-downloads:
	@$(PHASE) "build: downloads for the first run" "1 minute" tests/lab/first-run -p

run-container:
	@$(PHASE) "first container" "1 minute" tests/lab/first-run $(SHIM)
