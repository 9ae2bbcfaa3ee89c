#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Allocations that fail: in constructors one after the other, and all of them on the path of an I/O."""

import errno
import os
import random
import re
import subprocess
import threading

from obdtest import dm, image, inject
from obdtest.disk import Disk, same_bytes, verify_random
from obdtest.dm import line
from obdtest.ktap import Failure, add, check, defer, equal, main, note, test
from obdtest.module import MODULE, finit_module, module_file, use_count

DATA = image.sample(400000, 91)
PADDED = DATA + bytes(-len(DATA) % 512)
VSIZE = 512 << 10
LAYERS = [image.lsmt(VSIZE, [(0, image.sample(VSIZE, 92))]),
          image.lsmt(VSIZE, [(nth * 8, image.sample(512, nth)) for nth in range(100)]),
          image.lsmt(VSIZE, [(7, 90), (500, image.sample(64 * 512, 93))])]
PLAIN = image.flatten([image.Lsmt(layer) for layer in LAYERS])


def walk(what, table, wanted):
    """Lets each allocation of a constructor fail, one after the other, until all was well without."""
    device = dm.Device()
    nth = inject.Nth(module_only=True)
    outcomes = {}
    count = 0
    while True:
        count += 1
        nth.arm(count)
        try:
            device.load(table)
            outcome = "success"
        except OSError as error:
            outcome = errno.errorcode[error.errno]
        finally:
            failed = nth.disarm()
        if not failed:
            break
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome == "success":
            device.clear()
        check(count < 5000, "there is no end to it")
    equal(outcome, "success", "without a failure")
    device.resume()
    note(f"{what}: {count - 1} allocations, outcomes {outcomes}")
    check(outcomes.get("ENOMEM", 0) > 5, f"outcomes {outcomes}")
    check(set(outcomes) <= {"ENOMEM", "success"}, f"outcomes {outcomes}")
    disk = Disk(device)
    same_bytes(disk.whole(), wanted, "content after all that")
    disk.close()
    device.remove()
    equal(use_count(), 0, "use count of the module")


def zfile_walk(algorithm, block, cache):
    raw = image.zfile(DATA, algorithm, block)
    loop = dm.Loop(raw)
    walk("zfile", line(0, dm.sectors(len(DATA)), "zfile", loop.path, len(raw), 2, "cache_blocks", cache), PADDED)


@test("each allocation of an lsmt constructor fails in turn")
def lsmt_walk():
    loops = [(dm.Loop(raw), len(raw)) for raw in LAYERS]
    args = [arg for loop, size in loops for arg in (loop.path, size)]
    walk("lsmt", line(0, VSIZE // 512, "lsmt", len(loops), *args), PLAIN)


def quiet_console():
    """Keeps warnings from the console; the kernel's log has them."""
    with open("/proc/sys/kernel/printk", "r+", encoding="ascii") as file:
        before = file.read().split()[0]
        file.seek(0)
        file.write("1")

    def restore():
        with open("/proc/sys/kernel/printk", "w", encoding="ascii") as file:
            file.write(before)

    defer(restore)


@test("each allocation of the module's own start fails in turn")
def module_walk():
    path = module_file()
    nth = inject.Nth()
    log = dm.KernelLog()
    log.mark(log.LOOKS)
    quiet_console()
    defer(lambda: os.path.exists(MODULE) or subprocess.run(["insmod", path], check=True))
    subprocess.run(["rmmod", "dm_overlaybd"], check=True)
    with open(path, "rb") as file:
        fd = file.fileno()
        count, outcomes = 0, {}
        while True:
            count += 1
            nth.arm(count)
            error = finit_module(fd)
            if not nth.disarm():
                break
            equal(os.path.exists(MODULE), not error, f"whether it is there, with error {error} at {count}")
            outcome = errno.errorcode[error] if error else "success"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if not error:
                subprocess.run(["rmmod", "dm_overlaybd"], check=True)
    equal(error, 0, "the error without a failure")
    note(f"{count - 1} allocations, outcomes {outcomes}")
    check(outcomes.get("ENOMEM", 0) > 20 and set(outcomes) <= {"ENOMEM", "success"}, f"outcomes {outcomes}")
    # The kernel's module loader warns of its own allocations that fail; ours says nothing.
    worse = re.compile(r"\[dm_overlaybd\]|WARNING:|BUG:|INFO:|Oops|KASAN|UBSAN|lockdep")
    equal([row for row in log.lines() if worse.search(row)], [], "complaints")
    log.mark(log.LOOKED)
    loop = dm.Loop(image.zfile(DATA))
    same_bytes(Disk(dm.zfile(loop, "-", len(DATA))).whole(), PADDED, "content after all that")


class Reads:
    """Threads that read and compare."""

    def __init__(self, devices, rounds):
        self.errors = []
        self.threads = [threading.Thread(target=self._read, args=(device, wanted, rounds, seed))
                        for device, wanted in devices for seed in range(4)]

    def _read(self, device, wanted, rounds, seed):
        try:
            verify_random(device, wanted, random.Random(seed), rounds)
        except (Failure, OSError) as error:
            self.errors.append(error)

    def run(self):
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join()
        check(not self.errors, f"{len(self.errors)} readers: {self.errors[:1]}")


def devices_of_all_kinds():
    """(device, its bytes) of each kind of read: whole blocks, parts of them, cached or all or not, stacked."""
    found = []
    for algorithm in image.NAMES:
        for block in (4096, 65536):
            for options in ((2, "cache_blocks", 0), (2, "cache_blocks", 64), (3, "cache_blocks", 64, "cache_all")):
                raw = image.zfile(DATA, algorithm, block)
                loop = dm.Loop(raw)
                table = line(0, dm.sectors(len(DATA)), "zfile", loop.path, len(raw), *options)
                found.append((dm.create(table), PADDED))
    layers = []
    for raw in LAYERS:
        packed = image.zfile(raw, image.ZSTD)
        layers.append((dm.zfile(dm.Loop(packed), len(packed), len(raw)), len(raw)))
    found.append((dm.lsmt(VSIZE, *layers), PLAIN))
    return found


def no_memory(start, *args):
    """The module gets no memory at all, or now and then: reads go on, by the spare buffers, and are
    right. This test fails without them."""
    disks = [(Disk(device), wanted) for device, wanted in devices_of_all_kinds()]
    for disk, _ in disks:
        disk.flush()
    end = start(*args)
    Reads(disks, 12).run()
    failed = end()
    note(f"{failed} allocations failed")
    check(failed > 100, f"only {failed} allocations failed")
    for disk, wanted in disks:
        same_bytes(disk.whole(), wanted, "content when there is memory again")


for each, each_block, each_cache in ((image.LZ4, 4096, 0), (image.ZSTD, 65536, 64)):
    add(f"each allocation of a zfile constructor fails in turn ({image.NAMES[each]}, {each_block}, cache {each_cache})",
        zfile_walk, each, each_block, each_cache)
add("all allocations on the path of an I/O fail: reads go on", no_memory, inject.allocations, 100)
add("some allocations on the path of an I/O fail", no_memory, inject.allocations, 30)
add("memory is fragmented, there are single pages only: reads go on", no_memory, inject.contiguous_pages)


if __name__ == "__main__":
    main()
