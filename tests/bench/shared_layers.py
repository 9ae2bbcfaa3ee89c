# SPDX-License-Identifier: GPL-2.0
"""Images with layers in common: the memory, reads and time that many of them cost.

Each image is a file system with 8 files that all images have, and 2 of its own. With obdsetup, each file is a layer of
an erofs, opened with private devices, with shared ones, and with shared ones and shared inodes. To compare, each image
is also a plain file with an erofs or a squashfs, on a loop device. All files are on an ext4, on a mapped device over a
RAM disk; the reads of the mapped device are counted.
"""

import contextlib
import fcntl
import glob
import io
import json
import os
import random
import statistics
import subprocess
import tarfile
import time

from obdtest import dm, image
from obdtest.memory import drop_caches, kernel_memory, meminfo

KIB, MIB = 1 << 10, 1 << 20
COMMON, OWN = 8, 2
# The size in bytes of a file that all images have, and of a file that one image has.
LARGE, SMALL = 512 * KIB, 64 * KIB
NAME = "obdbench"
# The milliseconds that each read of the slow disk takes.
DELAY = 5
LOOP_CTL_REMOVE = 0x4C81


def run(*args):
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def timed(function, *args):
    start = time.monotonic()
    function(*args)
    return time.monotonic() - start


def page_cache():
    """Returns the KiB of page cache of files and of block devices."""
    fields = meminfo()
    return fields["Cached"] + fields["Buffers"]


def memory_used():
    """Returns the KiB of kernel memory in use, without what earlier measurements have left: loop devices without a file,
    and empty slabs."""
    with open("/dev/loop-control", encoding="ascii") as control:
        for loop in glob.glob("/sys/block/loop*"):
            with contextlib.suppress(OSError):
                fcntl.ioctl(control, LOOP_CTL_REMOVE, int(os.path.basename(loop)[4:]))
    drop_caches()
    for path in glob.glob("/sys/kernel/slab/*/shrink"):
        with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
            file.write("1")
    return kernel_memory()


def content(path):
    with open(path, "rb") as file:
        while file.read(MIB):
            pass


def files(nth):
    """Yields the name and content of each file of image nth."""
    for number in range(COMMON):
        yield f"common{number}", image.sample(LARGE, number)
    for number in range(OWN):
        yield f"own{nth}-{number}", image.sample(SMALL, 1000 + nth * OWN + number)


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


class Store:
    """A file system on the RAM disk `ram`, for the files of all images. Each read takes `delay` milliseconds longer."""

    def __init__(self, ram, delay=0):
        with open(f"/sys/block/{os.path.basename(ram)}/size", encoding="ascii") as file:
            sectors = int(file.read())
        # RAM disks don't count reads, mapped devices do.
        target = ("delay", ram, 0, delay, ram, 0, 0) if delay else ("linear", ram, 0)
        self.disk, self.path = dm.create(dm.line(0, sectors, *target), readonly=False), f"/run/{NAME}"
        try:
            os.makedirs(self.path, exist_ok=True)
            run("mkfs.ext4", "-q", "-F", self.disk.path)
            run("mount", self.disk.path, self.path)
        except RuntimeError:
            self.disk.remove()
            raise

    def kib_read(self):
        """Returns how many KiB were read from the disk."""
        with open(f"/sys/block/{os.path.basename(self.disk.path)}/stat", encoding="ascii") as file:
            return int(file.read().split()[2]) // 2

    def layers(self, nth):
        """Returns the files of the layers of image nth, lowest first. Makes those that don't exist."""
        paths = []
        for name, data in files(nth):
            path = f"{self.path}/{name}.obd"
            if not os.path.exists(path):
                self._layer(path, name, data, paths)
            paths.append(path)
        return paths

    def _layer(self, path, name, data, below):
        with tarfile.open(f"{path}.tar", "w") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        base = [word for layer in below for word in ("--base", layer)]
        kind = ("apply",) if below else ("convert", "--fs", "erofs")
        run("obdsetup", *kind, f"{path}.tar", *base, path)
        os.unlink(f"{path}.tar")

    def file(self, nth, kind):
        """Returns the file of image nth, an erofs or a squashfs. Makes it if it doesn't exist."""
        path, tree = f"{self.path}/image{nth}.{kind}", f"{self.path}/tree"
        if not os.path.exists(path):
            os.makedirs(tree, exist_ok=True)
            for name in os.listdir(tree):
                os.unlink(f"{tree}/{name}")
            for name, data in files(nth):
                write(f"{tree}/{name}", data)
            run(*{"erofs": ("mkfs.erofs", "--quiet", "-zlz4", path, tree),
                  "squashfs": ("mksquashfs", tree, path, "-comp", "lz4", "-quiet", "-no-progress")}[kind])
        return path

    def close(self):
        run("umount", self.path)
        self.disk.remove()


def place(nth):
    return f"/run/{NAME}{nth}"


def decompressed(word=""):
    """Returns how many blocks the zfile devices with `word` in their names have decompressed."""
    rows = run("dmsetup", "status", "--noflush", "--target", "zfile").splitlines()
    rows = [row for row in rows if " zfile " in row and word in row.split(":")[0]]
    return sum(int(row.split(" zfile ")[1].split()[7]) for row in rows)


class Stacks:
    """Images of layers, opened by obdsetup with these options, and mounted."""

    def __init__(self, store, *options, mount=""):
        self.store, self.options, self.mount = store, options, mount

    def prepare(self, nth):
        self.store.layers(nth)

    def up(self, nth):
        run("obdsetup", "open", *self.options, f"{NAME}{nth}", *self.store.layers(nth))
        run("mount", "-t", "erofs", "-o", f"ro{self.mount}", f"/dev/mapper/{NAME}{nth}", place(nth))

    def down(self, nth):
        subprocess.run(["umount", place(nth)], capture_output=True, check=False)
        run("obdsetup", "close", f"{NAME}{nth}")

    def counted(self):
        """Returns figures of the module: blocks decompressed, and KiB in the cache."""
        with open("/sys/module/dm_overlaybd/parameters/cache_bytes", encoding="ascii") as file:
            return {"blocks decompressed": decompressed(), "KiB of the module's cache": int(file.read()) // KIB}


class Files:
    """Images that are one plain file each, mounted."""

    def __init__(self, store, kind):
        self.store, self.kind = store, kind

    def prepare(self, nth):
        self.store.file(nth, self.kind)

    def up(self, nth):
        run("mount", "-t", self.kind, "-o", "ro,loop", self.store.file(nth, self.kind), place(nth))

    def down(self, nth):
        run("umount", place(nth))
        os.unlink(self.store.file(nth, self.kind))

    def counted(self):
        """Returns nothing: the kernel does not count this for these file systems."""
        return {}


def ways(store):
    """Returns the ways to open images, by their names in the results."""
    return {"private": Stacks(store, "--private"), "shared": Stacks(store),
            "inode_share": Stacks(store, mount=f",inode_share,domain_id={NAME}"),
            "erofs": Files(store, "erofs"), "squashfs": Files(store, "squashfs")}


def read(nth):
    for entry in os.scandir(place(nth)):
        content(entry.path)


def block_devices():
    """Returns the numbers of mapped devices and loop devices in use."""
    mapped = sum(name.startswith("dm-") for name in os.listdir("/sys/block"))
    return {"mapped devices": mapped, "loop devices": len(run("losetup", "--noheadings", "--list").splitlines())}


def around(times, nth):
    """Returns the median of the nth time, counted from 1, and of the two before it."""
    return round(statistics.median(times[max(nth - 3, 0):nth]), 3)


def measure(store, way, count):
    """Opens count images, and reads all files of each, image by image in random order. Returns the figures by name."""
    for nth in range(count):
        os.makedirs(place(nth), exist_ok=True)
        way.prepare(nth)
    run("sync")
    drop_caches()
    up, times = 0, []
    had, read_before, memory, cached = block_devices(), store.kib_read(), memory_used(), page_cache()
    try:
        for nth in range(count):
            up = nth + 1
            times.append(timed(way.up, nth))
        figures = {"seconds to open all": round(sum(times), 2)}
        if count >= 10:
            figures |= {f"seconds to open number {nth}": around(times, nth) for nth in sorted({10, count})}
        figures |= {what: number - had[what] for what, number in block_devices().items()}
        figures["KiB of kernel memory, idle"] = memory_used() - memory
        order = list(range(count))
        random.Random(1).shuffle(order)
        for nth in order:
            read(nth)
        return figures | {"KiB read below": store.kib_read() - read_before,
                          "KiB of page cache": page_cache() - cached} | way.counted()
    finally:
        for nth in reversed(range(up)):
            way.down(nth)


def second(store, mode):
    """Opens two images, and reads the common files from one, then from the other. Returns the figures of both. With
    mode, sets the caches to this mode."""
    way, figures = Stacks(store), {}
    for nth in range(2):
        os.makedirs(place(nth), exist_ok=True)
        way.prepare(nth)
    up = 0
    try:
        for nth in range(2):
            up = nth + 1
            way.up(nth)
        for row in run("dmsetup", "ls", "--target", "zfile").splitlines() if mode else ():
            run("dmsetup", "message", row.split()[0], "0", "cache", mode)
        drop_caches()
        for nth, which in enumerate(("first", "second")):
            # Read the metadata of the files first: it is in the layers that only this image has.
            for number in range(COMMON):
                os.stat(f"{place(nth)}/common{number}")
            kib, blocks = store.kib_read(), decompressed("common")
            took = sum(timed(content, f"{place(nth)}/common{number}") for number in range(COMMON))
            figures |= {f"{which}: seconds": round(took, 3), f"{which}: KiB read below": store.kib_read() - kib,
                        f"{which}: blocks of common layers decompressed": decompressed("common") - blocks}
        return figures
    finally:
        for nth in reversed(range(up)):
            way.down(nth)


def main(ram, counts, fact):
    """Measures on the RAM disk `ram`. Calls fact(name, value) with each figure."""
    store = Store(ram)
    try:
        for count in counts:
            for what, way in ways(store).items():
                try:
                    for name, value in measure(store, way, count).items():
                        fact(f"sharing, {what}, {count} images, {name}", value)
                except (RuntimeError, OSError) as error:
                    fact(f"sharing, {what}, {count} images, failed", json.dumps(str(error)))
    finally:
        store.close()
    for disk, delay in (("RAM disk", 0), (f"{DELAY} ms a read", DELAY)):
        store = Store(ram, delay)
        try:
            for mode in ("", "none"):
                for name, value in second(store, mode).items():
                    fact(f"sharing, {disk}, cache {mode or 'as open sets it'}, {name}", value)
        finally:
            store.close()
