#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The recipe `Virtual machines that share memory' in Documentation/recipes.rst."""

import contextlib
import hashlib
import os
import random
import shutil

from obdtest.cgroup import Group
from obdtest.guest import KERNEL, RELEASE, SHELL, Guest, in_page_cache, make_initrd
from obdtest.ktap import Skip, check, defer, equal, main, note, test
from obdtest.memory import drop_caches
from obdtest.recipes import APP, DATA, Work, digest, main_in_vm, need, quietly, recipe, sh

MODULE = f"{os.path.dirname(os.path.abspath(__file__))}/../../build/{RELEASE}/dm_overlaybd.ko"
THIRD = random.Random(93).randbytes(300 << 10)
LAYERS = ("base", "app", "more")
SUMS = {"data": digest(DATA), "app": digest(APP), "third": digest(THIRD)}

# The recipe's commands replace %s.
INIT = r"""#!/bin/busybox sh
export PATH=/bin DM_DISABLE_UDEV=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir /run /tmp
while read -r module; do insmod "/modules/$module"; done </modules/order
last=$(($(echo $sizes | tr , '\n' | wc -l) - 1))
while [ ! -b /dev/pmem$last ]; do sleep 0.1; done
%s
""" + SHELL


def make_more(work):
    """Makes a third layer, more.obd."""
    with open("disk.raw", "wb") as file:
        file.write(work.disk)
    sh("mount -o loop disk.raw /mnt")
    with open("/mnt/third", "wb") as file:
        file.write(THIRD)
    sh("umount /mnt; obdsetup create --base base.obd --base app.obd --image disk.raw more.obd")


def remove_devices():
    """Removes the devices that a failed test has left."""
    for name in LAYERS:
        quietly("bash", "-c", f"deps=$(dmsetup deps -o blkdevname {name}-pages) && dmsetup remove {name}-pages && "
                "losetup --detach /dev/$(sed 's/.*(\\(.*\\))/\\1/' <<<\"$deps\")")


def pages(name):
    return f"/dev/mapper/{name}-pages"


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(guest, names, when):
    """Makes a guest compute checksums of its files, and checks them."""
    rows = guest.ask(f"sha256sum {' '.join(f'/mnt/{name}' for name in names)}")
    equal({row.split()[1][5:]: row.split()[0] for row in rows}, {name: SUMS[name] for name in names},
          f"checksums in the {guest.name}, {when}")


def cached(names):
    """Returns how many KiB of the layers are in the page cache of this machine."""
    return sum(in_page_cache(pages(name)) for name in names)


def shared(guests, names, when):
    """Checks that the guests share the memory of these layers, and that no page of it is private to a guest or
    written."""
    maps = [guest.mappings() for guest in guests]
    for name in names:
        fields = [one[pages(name)] for one in maps]
        rss, pss = [one["Rss"] for one in fields], sum(one["Pss"] for one in fields)
        here = in_page_cache(pages(name))
        note(f"{name}, {when}: Rss {rss} KiB, sum of Pss {pss}, page cache {here}")
        check(min(rss) >= 400, f"Rss of {name} in each guest: {rss} KiB")
        # Pages that only one guest has read add to the sum.
        check(pss <= max(rss) * 1.2, f"{name} is in memory more than once: Rss {rss}, sum of Pss {pss}")
        check(here <= max(rss) * 1.5 + 1024, f"{name} is cached more than once: Rss {rss}, page cache {here}")
        for one, guest in zip(fields, guests):
            equal((one["Private_Dirty"], one["Shared_Dirty"], one["Anonymous"]), (0, 0, 0),
                  f"memory of {name} that is written, or private to the {guest.name}")


def reclaim(group, names):
    """Reclaims memory of the group until less than 256 KiB of the layers are in the page cache."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            group.write("memory.reclaim", "4M")
        if cached(names) < 256:
            break


@test("two guests share the memory of their common layers, and this machine can reclaim it", timeout=3000)
def two_guests():
    need("qemu-system-x86_64", "cpio", "strip", "ldd")
    if not os.path.exists(KERNEL) or not os.path.exists(MODULE):
        raise Skip("no kernel, or no module, for a guest")
    group = Group("memory")
    work = Work()
    make_more(work)
    make, devices, first, second, inside, down = recipe("Virtual machines that share memory")
    sh(make, timeout=300)
    defer(remove_devices)
    sh(devices)
    content = {name: file_digest(pages(name)) for name in LAYERS}
    shutil.copy(KERNEL, "vmlinuz")
    make_initrd("initrd.img", INIT % inside, RELEASE,
                ["virtio_pci", "virtio_pmem", "nd_pmem", "dm-mod", "ext4"], ["obdsetup", "dmsetup"],
                MODULE)
    drop_caches()
    equal(cached(LAYERS), 0, "KiB of the layers in the page cache before")

    guests = []
    for name, command, layers in (("first guest", first, LAYERS[:2]), ("second guest", second, LAYERS)):
        command = command.replace("qemu-system-x86_64", "exec qemu-system-x86_64")
        guests.append(Guest(name, ["bash", "-euc", command], [pages(layer) for layer in layers], group.enter,
                            timeout=1400))
    for guest in guests:
        note(f"{guest.name}: {guest.boot('@booted')} s")
    one, two = guests
    files = (("data", "app"), ("data", "app", "third"))
    before = [guest.meminfo()["Cached"] for guest in guests]
    for guest, names in zip(guests, files):
        checksums(guest, names, "first time")
    for guest, had in zip(guests, before):
        check(guest.meminfo()["Cached"] - had < 512, "the guest's page cache has grown")
    shared(guests, LAYERS[:2], "read by both")
    fields = two.mappings()[pages("more")]
    check(fields["Rss"] >= 300 and fields["Pss"] == fields["Rss"], f"the third layer is not in one guest only: {fields}")

    # Dropping caches does not drop mapped pages.
    drop_caches()
    note(f"dropping caches leaves {cached(LAYERS)} KiB")
    reclaim(group, LAYERS)
    rss = sum(fields["Rss"] for guest in guests for path, fields in guest.mappings().items() if path != "ram")
    note(f"reclaim leaves {cached(LAYERS)} KiB, and {rss} mapped")
    check(cached(LAYERS) < 256 and rss < 512, "this machine has not reclaimed the memory")
    for guest, names in zip(guests, files):
        checksums(guest, names, "after reclaim")
    shared(guests, LAYERS[:2], "read again")

    # Under a limit that leaves no room for all pages of the layers.
    reclaim(group, LAYERS)
    group.write("memory.high", str(int(group.read("memory.current")) + (1 << 20)))
    for _ in range(2):
        for guest, names in zip(guests, files):
            checksums(guest, names, "under a limit")
    events = dict(row.split() for row in group.read("memory.events").splitlines())
    note(f"events: {events}")
    check(int(events["high"]) > 0, "the limit was not reached")
    equal(events["oom_kill"], "0", "processes killed")
    group.write("memory.high", "max")

    # A guest that writes to the device of a layer.
    note(one.ask("dd if=/dev/zero of=/dev/pmem0 bs=4096 seek=512 count=64 conv=fsync || true"))
    for guest, names in zip(guests, files):
        checksums(guest, names, "after a guest has written")
    equal({name: file_digest(pages(name)) for name in LAYERS}, content, "content of the layers")
    # This test has read all of the layers; what no guest has mapped goes.
    drop_caches()
    shared(guests, LAYERS[:2], "after a guest has written")

    for guest in guests:
        equal(guest.ask("dmesg | grep -E 'WARNING|BUG:|Oops|Call Trace' || true"), [], f"complaints in the {guest.name}")
        guest.stop()
    sh(down)
    equal([name for name in LAYERS if os.path.exists(pages(name))], [], "devices that are left")


if __name__ == "__main__":
    main_in_vm(main)
