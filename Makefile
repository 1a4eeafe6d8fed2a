# The entries of this project. Each installs the Debian packages that it needs, and says so.
CARGO ?= cargo

.PHONY: help demo test test-libvirt test-others test-next check bench deb

help:
	@echo "make demo    boot a guest, back it up twice while it writes, restore it, boot what was restored"
	@echo "make test    everything: formatting, lints, docs, layers, unit tests, guests"
	@echo "make test-next  the guest tests with the QEMU and libvirt of the next Debian release"
	@echo "make check   the quick part of it, without QEMU"
	@echo "make deb     build the Debian package, and try to install and remove it"
	@echo "make bench   compare with nbdcopy, qemu-img, zstd, restic; writes docs/benchmarks.md"

demo:
	scripts/packages demo
	$(CARGO) build --release --workspace
	scripts/demo

test:
	scripts/packages test
	$(MAKE) check
	$(CARGO) build --workspace --bins
	$(CARGO) test --workspace --test '*' --no-run
	$(MAKE) -j2 --output-sync=line test-libvirt test-others
	$(CARGO) test --workspace --doc
	DPKG_DEB_COMPRESSOR_TYPE=none scripts/deb $${CARGO_TARGET_DIR:-target}/debug/kvmsnap $${CARGO_TARGET_DIR:-target}/debug/debian

# Side by side, for much of their time is waiting. All of libvirt in one, for they share a daemon; two of the
# others go with them, so that both take about as long.
tests := $(sort $(basename $(notdir $(wildcard */tests/*.rs))))
of_libvirt := $(filter libvirt% image_boot lvm,$(tests))
test-libvirt: wanted := $(of_libvirt)
test-others: wanted := $(filter-out $(of_libvirt),$(tests))
test-libvirt test-others:
	KVMSNAP_REQUIRE_QEMU=1 $(CARGO) test --workspace --no-fail-fast $(addprefix --test ,$(wanted))

test-next:
	scripts/packages test
	scripts/test-next

check:
	$(CARGO) fmt --all --check
	scripts/layers
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet
	$(CARGO) test --workspace --lib --bins

bench:
	scripts/packages bench
	$(CARGO) build --release --workspace
	scripts/bench

deb:
	scripts/packages deb
	$(CARGO) build --release -p kvmsnap
	scripts/deb
