#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Guests whose images have layers in common: the memory of this machine that they use, and how long they take to boot.

guests.py DIRECTORY KERNEL ACCELERATOR [WAY...], in the tool-chain root with the stock kernel at /kernel. QEMU boots
KERNEL. The images, until the end, and guests.json are in DIRECTORY. The image of each guest has the common layers base
and app, and a layer of its own. Each guest boots from its image, then reads all files of the image.
"""

import functools
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

# pylint: disable=wrong-import-position
from obdtest import guest, ktap

MIB = 1 << 20
COUNTS = (1, 2, 4)
# The size of each file in bytes, and the numbers of files that the layers base, app and own add.
FILE, BASE, APP, OWN = 4 * MIB, 12, 8, 1
DISK = 128 * MIB
# The memory of a guest in MiB: enough to cache all of its image.
MEMORY = 320


def run(*args):
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}: status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Images:
    """The layers and the images of all guests, in the current directory."""

    def __init__(self, count):
        self.sums, self.sizes = {}, {}
        os.mkdir("tree")
        for name in ("bin", "proc", "sys", "dev"):
            os.mkdir(f"tree/{name}")
        shutil.copy(shutil.which("busybox"), "tree/bin/busybox")
        for name, text in (("first", "first\n"), ("guest", guest.GUEST)):
            with open(f"tree/{name}", "w", encoding="ascii") as file:
                file.write(text)
        for nth in range(BASE):
            self._file(f"tree/base{nth}")
        run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", "-d", "tree", "base.raw", f"{DISK // MIB}m")
        self._layer("base", [])
        self._add("base", "app", APP, ["base"])
        for nth in range(count):
            self._add("app", f"own{nth}", OWN, ["base", "app"])

    def _file(self, path):
        data = random.Random(path).randbytes(FILE)
        with open(path, "wb") as file:
            file.write(data)
        self.sums[os.path.basename(path)] = hashlib.md5(data).hexdigest()

    def _add(self, below, name, count, layers):
        """Makes a disk, a copy of the disk below with count more files, and the layer with these files."""
        run("cp", "--sparse=always", f"{below}.raw", f"{name}.raw")
        for nth in range(count):
            self._file(f"{name}-{nth}")
            run("debugfs", "-w", "-R", f"write {name}-{nth} {name}-{nth}", f"{name}.raw")
            os.unlink(f"{name}-{nth}")
        self._layer(name, layers)

    def _layer(self, name, below):
        base = [word for layer in below for word in ("--base", f"{layer}.lsmt")]
        # pad() changes the lengths of the layers only when all are made.
        run("obdsetup", "create", "--dax", *base, "--image", f"{name}.raw", f"{name}.lsmt")
        self.sizes[name] = os.path.getsize(f"{name}.lsmt")

    def pad(self):
        """Pads the layers to multiples of 2 MiB, the unit of pmem devices."""
        for name, size in self.sizes.items():
            os.truncate(f"{name}.lsmt", -(-size // guest.HUGE) * guest.HUGE)
        for name in os.listdir("."):
            if name.endswith((".raw", ".lsmt")):
                with open(name, "r+b") as file:
                    os.fsync(file.fileno())

    def table(self, names, target):
        """Returns a function that takes the names of a guest's disks, which are these layers, and returns the table
        line."""
        def line(disks):
            words = [word for disk, name in zip(disks, names) for word in (disk, str(self.sizes[name]))]
            return f"0 {DISK // 512} {target} {len(names)} {' '.join(words)}"
        return line


def layers(images, nth, target, **options):
    names = ["base", "app", f"own{nth}"]
    return {"files": [f"{name}.lsmt" for name in names], "table": images.table(names, target), **options}


def image(_images, nth, **options):
    return {"files": [f"own{nth}.raw"], **options}


# By name: a description, and a function that returns the arguments of guest.qemu() for guest nth.
WAYS = {
    "pmem-layers": ("virtio-pmem, a device for each layer",
                    lambda images, nth: layers(images, nth, "lsmt-dax", pmem=True)),
    "pmem-image": ("virtio-pmem, a raw image for each guest", lambda images, nth: image(images, nth, pmem=True)),
    "blk-layers": ("virtio-blk, a device for each layer",
                   lambda images, nth: layers(images, nth, "lsmt", pmem=False)),
    "blk-image": ("virtio-blk, a raw image for each guest", lambda images, nth: image(images, nth, pmem=False)),
    "blk-image-none": ("the same, cache=none", lambda images, nth: image(images, nth, pmem=False, cache="none")),
}


def drop(path):
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(guests):
    """Returns the figures of running guests, in MiB, by name."""
    maps = [one.mappings() for one in guests]
    files = {path for one in guests for path in one.files}
    rams = sum(one["ram"]["Rss"] for one in maps)
    cache = sum(map(guest.in_page_cache, files))
    mapped = [fields for one in maps for path, fields in one.items() if path != "ram"]
    kib = {"memory of the guests": rams, "page cache of the host": cache, "sum": rams + cache,
           "Rss of the files": sum(fields["Rss"] for fields in mapped),
           "Pss of the files": sum(fields["Pss"] for fields in mapped),
           "Private_Dirty of the files": sum(fields["Private_Dirty"] for fields in mapped),
           "page cache of the guests": sum(one.meminfo()["Cached"] + one.meminfo()["Buffers"] for one in guests)}
    return {name: round(value / 1024, 1) for name, value in kib.items()}


def measure(images, way, counts, command):
    """Starts guests one after the other. Returns the memory figures by the number of guests, and the times of each
    guest."""
    for name in os.listdir("."):
        if name.endswith((".raw", ".lsmt")):
            drop(name)
    guests, figures, times = [], {}, []
    for nth in range(max(counts)):
        options = WAYS[way][1](images, nth)
        one = guest.Guest(f"guest {nth}", command(**options), options["files"])
        guests.append(one)
        times.append([round(seconds, 2) for seconds in one.boot("@first byte", "@booted")])
        names = [name for name in images.sums if not name.startswith("own") or name.startswith(f"own{nth}-")]
        got = dict(reversed(row.split()) for row in one.ask(f"cd /; busybox md5sum {' '.join(names)}"))
        if got != {name: images.sums[name] for name in names}:
            raise RuntimeError(f"{way}, guest {nth}: wrong checksums: {got}")
        complaints = one.ask("busybox dmesg | busybox grep -E 'WARNING|BUG|Oops' || true")
        if complaints:
            raise RuntimeError(f"{way}, guest {nth}: {complaints}")
        if nth + 1 in counts:
            figures[nth + 1] = memory(guests)
            print(f"{way}, {nth + 1} guests: {figures[nth + 1]}, first byte and booted: {times[-1]}", flush=True)
    return {"what": WAYS[way][0], "memory": figures, "times": times}


def report(results):
    """Prints the tables, in Markdown."""
    columns = ("memory of the guests", "page cache of the host", "sum", "page cache of the guests", "Rss of the files",
               "Pss of the files")
    print("\nMiB of this machine's memory:\n")
    print(f"| image | guests | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for one in results.values():
        for count, figures in one["memory"].items():
            print(f"| {one['what']} | {count} | {' | '.join(str(figures[name]) for name in columns)} |")
    print("\nSeconds since QEMU was started, of the first guest and the median of the others:\n")
    print("| image | first byte | others | booted | others |\n|---|---|---|---|---|")
    for one in results.values():
        cells = []
        for which in range(2):
            first, *others = [times[which] for times in one["times"]]
            cells += [first, round(statistics.median(others), 2) if others else "-"]
        print(f"| {one['what']} | {' | '.join(map(str, cells))} |")


def main():
    directory, kernel, accel, *ways = sys.argv[1:]
    kernel, directory = os.path.realpath(kernel), os.path.realpath(directory)
    if unknown := set(ways) - set(WAYS):
        sys.exit(f"PARTS: no {' '.join(unknown)}; there are: {' '.join(WAYS)}")
    with open("/kernel/release", encoding="ascii") as file:
        release = file.read().strip()
    module = os.path.realpath(f"build/{release}/{guest.MODULE}.ko")
    with tempfile.TemporaryDirectory(prefix="images-", dir=directory) as work:
        os.chdir(work)
        images = Images(max(COUNTS))
        images.pad()
        guest.make_initrd("initrd", guest.INIT, release,
                          ["virtio_pci", "virtio_blk", "virtio_pmem", "nd_pmem", "dm-mod", "ext4"], ["dmsetup"], module)
        results = {}
        for way in ways or WAYS:
            results[way] = ktap.alone(measure, images, way, COUNTS,
                                      functools.partial(guest.qemu, kernel, "initrd", memory=MEMORY, accel=accel))
        os.chdir(directory)
    with open("guests.json", "w", encoding="ascii") as file:
        json.dump({"accelerator": accel, "release": release, "ways": results}, file, indent=1)
    report(results)


if __name__ == "__main__":
    main()
