#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The recipes `A disk of a virtual machine' and `A microVM of an image' in Documentation/recipes.rst."""

import io
import os
import re
import shutil
import tarfile

from obdtest.files import enter_work_directory
from obdtest.guest import KERNEL, RELEASE, make_initrd
from obdtest.ktap import Skip, check, defer, equal, main, note, test
from obdtest.oci import Layout
from obdtest.programs import need, need_module, quietly
from obdtest.recipes import APP, DATA, Work, digest, main_in_vm, nothing_left, recipe, sh, whole

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
    if not os.path.exists(KERNEL):
        raise Skip("no kernel for a guest")
    work = Work()
    shutil.copy(KERNEL, "vmlinuz")
    make_initrd("initrd.img", INIT, RELEASE, ["virtio_pci", "virtio_blk", "ext4"])
    (run,) = recipe("A disk of a virtual machine")
    out = sh(run, timeout=1400)
    note(out[-600:])
    # Output of the firmware may be on the same line.
    got = dict(re.findall(r"\b(disk|data|app) ([0-9a-f]{64})", out))
    wanted = {"disk": digest(work.disk), "data": digest(DATA), "app": digest(APP)}
    equal(got, wanted, "checksums in the guest")
    check("takes writes" not in out, "the guest could write to the disk")
    nothing_left()


MICRO_INIT = """#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
%s
"""
SCRIPT = b"""#!/bin/busybox sh
/bin/busybox echo "$WORD" >/written
/bin/busybox cat /written /etc/name
"""


@test("a microVM has a container image as its root: its command runs, and what it writes stays in the guest", timeout=900)
def micro():
    need("qemu-system-x86_64", "cpio", "python3", "busybox")
    need_module("erofs")
    if not os.path.exists(KERNEL):
        raise Skip("no kernel for a guest")
    enter_work_directory()
    defer(quietly, "obdsetup", "close", "app")
    with open(shutil.which("busybox"), "rb") as file:
        busybox = file.read()
    with tarfile.open("layer.tar", "w") as tar:
        for name, content in (("bin/busybox", busybox), ("bin/say", SCRIPT), ("etc/name", b"of the image\n")):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    Layout("layout", ["layer.tar"], command=["/bin/say"], env=["WORD=two words"])
    shutil.copy(KERNEL, "vmlinuz")
    make, run, inside, down = recipe("A microVM of an image")
    make_initrd("initrd.img", MICRO_INIT % inside, RELEASE, ["virtio_mmio", "virtio_blk", "erofs", "overlay"])
    if not os.access("/dev/kvm", os.W_OK):
        run = run.replace("panic=-1", "panic=-1 tsc_early_khz=1000000")
    sh(make)
    before = digest(whole("app"))
    out = sh(run, timeout=800)
    note(out[-600:])
    check("two words" in out and "of the image" in out, f"the command says {out[-600:]!r}")
    equal(digest(whole("app")), before, "content of the device")
    sh(down)
    check(not os.path.exists("/dev/mapper/app"), "the device is still there")


if __name__ == "__main__":
    main_in_vm(main)
