# SPDX-License-Identifier: GPL-2.0
# The commands of the project, which 'make help' describes. Each one runs a script. The kernel's build uses Kbuild.

ifneq ($(KERNELRELEASE),)
include $(src)/Kbuild
else

MAKEFLAGS += --no-print-directory
S := scripts

# Variables that are set on the command line or in the environment, for the scripts.
export KDIR KERNEL MIRROR V DESTDIR PREFIX RUN SHARE TIMEOUT CARGO MINUTES
export QEMU_MEM QEMU_SMP QEMU_ARGS KERNEL_ARGS OBD_GOLDENS RECORD VM COMPARE PARTS RUNS

.PHONY: all module tools setup demo check check-system check-boot check-forky check-debug check-kcsan check-all soak lint fuzz bench vm install deb check-deb pictures clean help

all: module

module:
	@$S/build-module.sh

tools:
	@$S/build-tools.sh

setup:
	@$S/setup.sh

demo:
	@$S/demo.sh

check:
	@$S/check.sh

# Runs the tests in tests/system, which need udev, LVM and other programs of a whole system.
check-system:
	@$S/check.sh system

# Boots a Debian with systemd whose root file system is an image.
check-boot:
	@$S/check-boot.sh

# Builds the module for the kernel of Debian forky, and runs the tests in the VM with that kernel.
check-forky:
	@$S/check.sh forky

# Runs the tests in the VM with a kernel that has KASAN, lockdep and other checkers.
check-debug:
	@$S/check.sh debug

# Runs the tests of concurrency in the VM with a kernel that finds data races (KCSAN).
check-kcsan:
	@$S/check.sh kcsan

# Runs the checks that CI (.ci/run) does not run, or not always. Prints what it leaves out.
check-all:
	@$S/check-all.sh

soak:
	@$S/check.sh soak

lint:
	@$S/lint.sh

fuzz:
	@$S/fuzz.sh $(or $(SECONDS),60) $(TARGET)

bench:
	@$S/bench.sh

# Builds the module for the VM's kernel, and obdsetup for the VM's Debian. NOBUILD=1: boots what is built already.
vm:
ifeq ($(NOBUILD),)
	@USE_ROOT=1 QUIET=1 $S/build-module.sh
	@QUIET=1 CARGO= $S/build-tools.sh
endif
	@$S/vm.sh

install:
	@$S/install.sh

deb:
	@$S/make-deb.sh

check-deb:
	@$S/check-deb.sh

# Draws the pictures from their sources, the .dot files, again. Commit the results.
pictures:
	@$S/pictures.sh

clean:
	@$S/clean.sh

help:
	@$S/help.sh
endif
