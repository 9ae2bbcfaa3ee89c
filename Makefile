# SPDX-License-Identifier: GPL-2.0
# What a user types; 'make help' tells. The kernel's build reads Kbuild, the work is done by scripts/.

ifneq ($(KERNELRELEASE),)
include $(src)/Kbuild
else

MAKEFLAGS += --no-print-directory
S := scripts

# Passed on to the scripts when given on the command line or in the environment.
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

# Tests of what an administrator puts together: tests/system.
check-system:
	@$S/check.sh system

# A Debian whose root file system is an image boots, under systemd.
check-boot:
	@$S/check-boot.sh

# The tests of check with the kernel of Debian forky.
check-forky:
	@$S/check.sh forky

# ... with one that has KASAN, lockdep and all.
check-debug:
	@$S/check.sh debug

# ... that finds data races.
check-kcsan:
	@$S/check.sh kcsan

# What CI does not run, and what is left out of that.
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

# The VM runs what is built for its own kernel; NOBUILD=1 takes what there is.
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

# Drawn anew from their sources; what comes out is committed.
pictures:
	@$S/pictures.sh

clean:
	@$S/clean.sh

help:
	@$S/help.sh
endif
