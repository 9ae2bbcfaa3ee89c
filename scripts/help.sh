#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Prints what make can do.
cat <<'END'
make                  build the module: build/RELEASE/dm_overlaybd.ko
make KDIR=DIR         ... for the kernel tree DIR (7.2 or later, with Rust); without KDIR and KERNEL, for the running
                      kernel if it has Rust, else for Debian's newest 7.3, which the test VM runs
make KERNEL=NAME      ... for that 7.3 (stock) or Debian forky's kernel (forky), in the tool-chain root
make tools            build obdsetup, for Debian 13 and the test VM: build/cargo/release/obdsetup
                      (CARGO=cargo: for this machine, with its own Rust; make install prefers this obdsetup)
make install          build what isn't built yet, and install module, obdsetup, udev rules, manual pages, completions,
                      and the units and hooks that open images at boot (DESTDIR=, PREFIX=/usr/local, KDIR=)
make deb              make two Debian packages, build/deb/*.deb: the module's source for DKMS, and obdsetup (CARGO=)
make demo             set everything up and show the module at work in the test VM
make check            set everything up, then lint, build, and run the tests that a change must pass
make check-system     run the tests that combine parts of a system: udev, LVM and others
make check-boot       boot a Debian whose root file system is made of layers: initramfs-tools, dracut, systemd
make check-forky      build the module for Debian forky's kernel, with forky's tool chain, and run the VM's tests
make check-debug      run the VM's tests with a kernel that has KASAN, lockdep, kmemleak and more (made once)
                      (OBD_FULL=1: all cycles of races)
make check-kcsan      run the tests with concurrency, with a kernel that finds data races
make soak             run random reads, faults, reloads and more together, for MINUTES=30, with check-debug's kernel
make check-all        run what CI (.ci/run: check, check-system, and check-debug if there is time) does not: the other
                      checks, and short runs of soak, fuzz and bench; prints what it left out (PARTS='NAME...')
make lint             the static checks only
make fuzz             run the fuzz targets (SECONDS=60 each, TARGET='NAME...', RECORD=FILE)
make bench            measure in User-Mode Linux, at the speed of this machine; compare with goals and other formats
                      (VM=qemu: some measurements, with the stock kernel; COMPARE=FILE: changes since that result.json;
                      PARTS='NAME...' of block file cache latency fairness lookup cost sharing interrupts;
                      VM=icount: instructions of the stock kernel, against tests/bench/instructions.json
                      (UPDATE=y: write that file anew; PROFILE=y: some rows also by function),
                      PARTS='NAME...' of block peers;
                      VM=guests: memory and start of virtual machines that share layers by DAX, and by other ways,
                      PARTS='WAY...' of pmem-layers pmem-image blk-layers blk-image blk-image-none;
                      VM=tools: how long obdsetup, mkfs.erofs, mksquashfs and qemu-img take to make images, in no VM,
                      RUNS=3 rounds, OBD_TREE_MIB=1024 of files, PARTS='NAME...' of PARTS in tests/bench/tools.py)
make vm               a shell in the test VM, with the module loaded (leave with exit, or Ctrl-a x)
make vm RUN='CMD'     run CMD there; if CMD fails, make prints its status as "Error N", and exits with 2
                      (RUN='CMD' scripts/vm.sh exits with CMD's status; 124: timeout, 125: the VM died)
make check-deb        install the packages in a fresh Debian 13, build the module by DKMS, load it in the VM, purge them
make pictures         draw Documentation/pictures/*.svg anew from the .dot files there, with this machine's Graphviz
make setup            only set up the tool chain and the kernel that the above need
make clean            remove build/

make expands RUN before the shell does: write $$ for a $.
For vm: NOBUILD=1 (boot what is built), SHARE=DIR (read-write at /mnt/share), TIMEOUT=SECONDS (1800, boot included),
KERNEL=forky, debug, kcsan (the kernels of these checks) or uml (with RUN only), QEMU_MEM=MiB (2048), QEMU_SMP=N (2),
QEMU_ARGS= and KERNEL_ARGS= (more arguments), OBD_GOLDENS=DIR (read-only at /mnt/goldens).
For set-up: MIRROR=URL of a Debian mirror. The cache, ${XDG_CACHE_HOME:-~/.cache}/dm-overlaybd, is shared by
all clones and may be deleted at any time. V=1 shows commands.
END
