# make run      sets everything up and runs a container in its own VM
# make test     everything that CI runs: lint, unit tests, end-to-end suites
# make build    the one executable, guest kernel and initramfs inside
# make install  copies it to $(DESTDIR)$(PREFIX)/bin
# make bench    work counted side by side with runc and QEMU (docs/BENCHMARKS.md)
# make lint, make unit, make suites, make setup, make clean
#
# Downloads and guest kernels are kept in $NUTSHELL_CACHE (~/.cache/nutshell); `make clean` leaves them.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
NUTSHELL_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/nutshell
export CARGO_TARGET_DIR NUTSHELL_CACHE

NAME := containerd-shim-nutshell-v2
TARGET := x86_64-unknown-linux-gnu
SHIM := $(CARGO_TARGET_DIR)/$(TARGET)/release/$(NAME)
AGENT := $(CARGO_TARGET_DIR)/$(TARGET)/guest/nutshell-agent
INITRAMFS := $(CARGO_TARGET_DIR)/guest/initramfs.cpio
PACKAGES := bc bison build-essential flex iproute2 libcap-ng-dev libelf-dev libseccomp-dev libssl-dev perl xz-utils

# The executable is to run where these libraries are not installed.
export LIBSECCOMP_LINK_TYPE := static
export LIBCAPNG_LINK_TYPE := static
export LIBSECCOMP_LIB_PATH := /usr/lib/x86_64-linux-gnu
export LIBCAPNG_LIB_PATH := /usr/lib/x86_64-linux-gnu

.PHONY: build setup agent install run test lint unit suites bench clean

# Static, so that it runs on any distribution, and starts without a dynamic linker.
build: agent
	kernel=$$(guest/kernel/build) && \
	NUTSHELL_GUEST_KERNEL=$$kernel NUTSHELL_GUEST_INITRAMFS=$(INITRAMFS) RUSTFLAGS='-C target-feature=+crt-static' \
	$(CARGO) build --locked --release -p nutshell --target $(TARGET)

agent: setup
	RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static' \
	$(CARGO) build --locked --profile guest -p nutshell-agent --target $(TARGET)
	mkdir -p $(dir $(INITRAMFS))
	guest/image/build $(AGENT) $(INITRAMFS)

setup:
	@tests/lab/need $(PACKAGES)

# Installs what `make build` built, so that it can be run as another user than the build.
install:
	@test -x $(SHIM) || { echo "$(SHIM) is not there: run \`make build\` first" >&2; exit 1; }
	install -D -m 755 $(SHIM) $(DESTDIR)$(PREFIX)/bin/$(NAME)

run: build
	@tests/lab/first-run $(SHIM)

test: lint unit suites

lint: setup
	$(CARGO) fmt --all --check
	rustfmt --edition 2024 --check tests/images/*.rs
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	tests/lab/deny check bans licenses sources
	tests/conformance/names

unit: setup
	$(CARGO) test --locked --workspace

suites: build
	tests/deploy
	guest/agent/tests/run-in-lab
	NUTSHELL_TEST_SHIM=$(SHIM) tests/run

bench: build
	NUTSHELL_TEST_SHIM=$(SHIM) benches/run

clean:
	$(CARGO) clean
