# SPDX-License-Identifier: GPL-2.0
"""Images with layers in common: what many of them cost, by obdsetup with private devices and with shared ones, by erofs
images that share inodes, and by plain files of other file systems on loop devices.

Each image has the same 8 layers, and 2 of its own; where an image is one file system, 8 files that all have and 2 of its
own. All are on a file system on a RAM disk, so that what is read below can be counted.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import time

from obdtest import image
from obdtest.memory import kernel_memory

KIB, MIB = 1 << 10, 1 << 20
COMMON, OWN = 8, 2
# Bytes of a layer or file that all have, and of one of an image's own.
LARGE, SMALL = 512 * KIB, 64 * KIB
SIZE = COMMON * LARGE + OWN * SMALL
NAME = "obdbench"


def run(*args):
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def timed(*args):
    start = time.monotonic()
    run(*args)
    return time.monotonic() - start


def page_cache():
    """KiB, that of files and that of block devices."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return sum(int(row.split()[1]) for row in file if row.startswith(("Cached:", "Buffers:")))


def forget():
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


def content(path):
    with open(path, "rb") as file:
        while file.read(MIB):
            pass


def parts(nth):
    """What image nth is made of: names, and bytes."""
    for number in range(COMMON):
        yield f"common{number}", image.sample(LARGE, number)
    for number in range(OWN):
        yield f"own{nth}-{number}", image.sample(SMALL, 1000 + nth * OWN + number)


class Store:
    """A file system on a RAM disk, with what is measured."""

    def __init__(self, device, count):
        self.device, self.count, self.path = device, count, "/run/obdbench"
        os.makedirs(self.path, exist_ok=True)
        run("mkfs.ext4", "-q", "-F", device)
        run("mount", device, self.path)

    def sectors(self):
        """Sectors that were read of the disk."""
        with open(f"/sys/block/{os.path.basename(self.device)}/stat", encoding="ascii") as file:
            return int(file.read().split()[2])

    def layers(self, nth):
        """Files of the layers of image nth, lowest first."""
        paths, sector = [], 0
        for name, data in parts(nth):
            path = f"{self.path}/{name}.obd"
            if not os.path.exists(path):
                raw = image.zfile(image.lsmt(SIZE, [(sector, data)]))
                if len(raw) % 512:
                    raw = image.tar(raw)
                with open(path, "wb") as file:
                    file.write(raw + bytes(-len(raw) % 512))
            paths.append(path)
            sector += len(data) // 512
        return paths

    def tree(self, nth):
        """A directory with the files of image nth."""
        path = f"{self.path}/tree"
        shutil.rmtree(path, ignore_errors=True)
        os.mkdir(path)
        for name, data in parts(nth):
            with open(f"{path}/{name}", "wb") as file:
                file.write(data)
        return path

    def file(self, nth, kind):
        """Image nth as one file: layer of an erofs, or a plain erofs or squashfs."""
        path = f"{self.path}/image{nth}.{kind}"
        if not os.path.exists(path):
            tree = self.tree(nth)
            make = {"obd": ("obdsetup", "create", "--directory", tree, "--fs", "erofs", path),
                    "erofs": ("mkfs.erofs", "--quiet", "-zlz4", path, tree),
                    "squashfs": ("mksquashfs", tree, path, "-comp", "lz4", "-quiet", "-no-progress")}
            run(*make[kind])
        return path

    def down(self):
        run("umount", self.path)


class Devices:
    """Images of layers, as disks."""

    def __init__(self, store, *options):
        self.store, self.options = store, options

    def prepare(self, nth):
        self.store.layers(nth)

    def up(self, nth):
        return timed("obdsetup", "open", *self.options, f"{NAME}{nth}", *self.store.layers(nth))

    def read(self, nth):
        content(f"/dev/mapper/{NAME}{nth}")

    def down(self, nth):
        run("obdsetup", "close", f"{NAME}{nth}")


class Mounts:
    """Images of one file system each, mounted."""

    def __init__(self, store, kind):
        self.store, self.kind = store, kind

    def place(self, nth):
        return f"/run/{NAME}{nth}"

    def prepare(self, nth):
        self.store.file(nth, self.kind)

    def up(self, nth):
        os.makedirs(self.place(nth), exist_ok=True)
        path = self.store.file(nth, self.kind)
        if self.kind != "obd":
            return timed("mount", "-t", self.kind, "-o", "ro,loop", path, self.place(nth))
        return timed("obdsetup", "open", f"{NAME}{nth}", path) + timed(
            "mount", "-t", "erofs", "-o", "ro,inode_share,domain_id=bench", f"/dev/mapper/{NAME}{nth}", self.place(nth))

    def read(self, nth):
        for entry in os.scandir(self.place(nth)):
            content(entry.path)

    def down(self, nth):
        run("umount", self.place(nth))
        if self.kind == "obd":
            run("obdsetup", "close", f"{NAME}{nth}")


def decompressed():
    """Blocks that all zfile devices have decompressed."""
    rows = run("dmsetup", "status", "--noflush", "--target", "zfile").splitlines()
    return sum(int(row.split(" zfile ")[1].split()[7]) for row in rows if " zfile " in row)


def measure(store, what, way, count, fact):
    """Opens so many images, then reads them."""
    for nth in range(count):
        way.prepare(nth)
    run("sync")
    forget()
    up = 0
    before = store.sectors(), kernel_memory(), page_cache()
    try:
        times = []
        for nth in range(count):
            times.append(way.up(nth))
            up = nth + 1
        memory = kernel_memory() - before[1]
        order = list(range(count))
        random.Random(1).shuffle(order)
        for nth in order:
            way.read(nth)
        figures = {"seconds to open all": round(sum(times), 2), "seconds to open the last one": round(times[-1], 3),
                   "KiB of kernel memory, idle": memory, "KiB read below": (store.sectors() - before[0]) // 2,
                   "KiB of page cache": page_cache() - before[2], "blocks decompressed": decompressed()}
        for name, value in figures.items():
            fact(f"sharing, {what}, {count} images, {name}", value)
    finally:
        for nth in reversed(range(up)):
            with contextlib.suppress(RuntimeError):
                way.down(nth)


def main(device, counts, fact):
    """Measures on the disk `device`; fact() takes a figure."""
    store = Store(device, max(counts))
    try:
        for count in counts:
            for what, way in (("private", Devices(store, "--private")), ("shared", Devices(store)),
                              ("inode_share", Mounts(store, "obd")), ("erofs", Mounts(store, "erofs")),
                              ("squashfs", Mounts(store, "squashfs"))):
                try:
                    measure(store, what, way, count, fact)
                except (RuntimeError, OSError) as error:
                    fact(f"sharing, {what}, {count} images, failed", json.dumps(str(error)))
    finally:
        store.down()
