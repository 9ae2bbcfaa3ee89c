#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Prints what make can do.
cat <<'END'
make                  build the module: build/RELEASE/dm_overlaybd.ko
make KDIR=DIR         ... for the kernel tree DIR (7.2 or later, with Rust); without KDIR for the running
                      kernel where it has Rust, else for Debian's newest 7.3, which the test VM runs
make tools            build obdsetup, for Debian 13 and the test VM: build/cargo/release/obdsetup
                      (CARGO=cargo: for this machine, with its own Rust; then make install takes that)
make install          build what isn't built yet, and install module, obdsetup, udev rules, manual pages, completions, and what sets images up at boot
                      (DESTDIR=, PREFIX=/usr/local, KDIR=)
make deb              make Debian packages of both, build/deb/*.deb: the module's source for DKMS, and obdsetup (CARGO=)
make demo             set everything up and show the module at work in the test VM
make check            set everything up, then lint, build and run the tests, but for those of the next three lines
make check-system     run the tests of what an administrator puts together: udev, LVM and others
make check-boot       boot a Debian whose root file system is made of layers: initramfs-tools, dracut, systemd
make check-forky      build the module for Debian forky's kernel, with forky's tool chain, and run the VM's tests
make check-debug      run the VM's tests with a kernel that has KASAN, lockdep, kmemleak and more (made once)
                      (OBD_FULL=1: all cycles of races)
make check-kcsan      run those that have several things at once with a kernel that finds data races
make soak             a random mix of everything for MINUTES=30, with the kernel of check-debug
make check-all        run what CI (.ci/run: check, check-system, and check-debug if there is time) does not: the checks
                      that are left, short runs of soak, fuzz and bench; says what it has left out (PARTS='NAME...')
make lint             the static checks only
make fuzz             run the fuzz targets (SECONDS=60 each, TARGET='NAME...', RECORD=FILE)
make bench            measure, and compare with goals and with others: in User-Mode Linux, as fast as this machine is
                      (VM=qemu: a part of it with the stock kernel; COMPARE=FILE: what is new since that result.json;
                      PARTS='NAME...' of block file cache latency fairness lookup cost sharing;
                      VM=icount: instructions of the stock kernel, against tests/bench/instructions.json
                      (UPDATE=y: write that file anew), PARTS='NAME...' of block peers;
                      VM=guests: memory and start of virtual machines that share layers by DAX, and by other ways,
                      PARTS='WAY...' of pmem-layers pmem-image blk-layers blk-image blk-image-none)
make vm               a shell in the test VM, with the module loaded (leave with exit, or Ctrl-a x)
make vm RUN='CMD'     run one command there; fails as it does ("Error N" has its status, make's own is then 2;
                      RUN='CMD' scripts/vm.sh exits with the status itself: 124 is time out, 125 a dead VM)
make check-deb        install them in a fresh Debian 13, have DKMS build the module, load it in the VM, purge them
make pictures         draw Documentation/pictures/*.svg anew from the .dot files there, with this machine's Graphviz
make setup            only set up the tool chain and the kernel that the above need
make clean            remove build/

RUN is make's before it is the shell's: a $ is written $$.
For vm: NOBUILD=1 (boot what is built), SHARE=DIR (read-write at /mnt/share), TIMEOUT=SECONDS (1800),
KERNEL=forky, debug, kcsan (the kernels of these checks) or uml (with RUN only), QEMU_MEM=MiB (2048), QEMU_SMP=N (2),
QEMU_ARGS= and KERNEL_ARGS= (more arguments), OBD_GOLDENS=DIR (read-only at /mnt/goldens).
For set-up: MIRROR=URL of a Debian mirror. The cache, ${XDG_CACHE_HOME:-~/.cache}/dm-overlaybd, is shared by
all clones and may be deleted at any time. V=1 shows commands.
END
