#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The recipe `A disk of a virtual machine' in Documentation/recipes.rst. Slow if the guest is emulated."""

import os
import re
import shutil

from obdtest.guest import make_initrd
from obdtest.ktap import Skip, check, equal, main, note, test
from obdtest.programs import need
from obdtest.recipes import APP, DATA, Work, digest, main_in_vm, nothing_left, recipe, sh

INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
while read -r module; do busybox insmod "/modules/$module"; done </modules/order
busybox mount -o ro /dev/vda /mnt
echo "disk $(busybox sha256sum </dev/vda)"
echo "data $(busybox sha256sum </mnt/data)"
echo "app $(busybox sha256sum </mnt/app)"
echo >/dev/vda && echo "the disk takes writes"
busybox reboot -f
"""


@test("a guest with the device as a virtio-blk disk reads the expected bytes, and can't write", timeout=1500)
def guest():
    need("qemu-system-x86_64", "cpio")
    kernel = os.environ.get("OBD_VM_KERNEL", "")
    if not os.path.exists(kernel):
        raise Skip("no kernel for a guest")
    work = Work()
    shutil.copy(kernel, "vmlinuz")
    make_initrd("initrd.img", INIT, os.uname().release, ["virtio_pci", "virtio_blk", "ext4"])
    (run,) = recipe("A disk of a virtual machine")
    out = sh(run, timeout=1400)
    note(out[-600:])
    # Output of the firmware may be on the same line.
    got = dict(re.findall(r"\b(disk|data|app) ([0-9a-f]{64})", out))
    wanted = {"disk": digest(work.disk), "data": digest(DATA), "app": digest(APP)}
    equal(got, wanted, "checksums in the guest")
    check("takes writes" not in out, "the guest could write to the disk")
    nothing_left()


if __name__ == "__main__":
    main_in_vm(main)
