#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Failing allocations: each in turn while a table or the module is loaded, and all or many during reads."""

import errno
import os
import random
import re
import subprocess
import threading
import time

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
    """Makes each allocation of a constructor fail in turn, until the constructor has no further allocation."""
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
        check(count < 5000, "the constructor still has allocations")
    equal(outcome, "success", "without a failure")
    device.resume()
    note(f"{what}: {count - 1} allocations, outcomes {outcomes}")
    check(outcomes.get("ENOMEM", 0) > 5, f"outcomes {outcomes}")
    check(set(outcomes) <= {"ENOMEM", "success"}, f"outcomes {outcomes}")
    disk = Disk(device)
    same_bytes(disk.whole(), wanted, "content after all failures")
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
    """Keeps warnings from the console; they are still in the kernel's log."""
    with open("/proc/sys/kernel/printk", "r+", encoding="ascii") as file:
        before = file.read().split()[0]
        file.seek(0)
        file.write("1")

    def restore():
        with open("/proc/sys/kernel/printk", "w", encoding="ascii") as file:
            file.write(before)

    defer(restore)


@test("each allocation during the loading of the module fails in turn")
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
            equal(os.path.exists(MODULE), not error, f"whether the module is loaded, with error {error} at {count}")
            outcome = errno.errorcode[error] if error else "success"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if not error:
                subprocess.run(["rmmod", "dm_overlaybd"], check=True)
    equal(error, 0, "the error without a failure")
    note(f"{count - 1} allocations, outcomes {outcomes}")
    check(outcomes.get("ENOMEM", 0) > 20 and set(outcomes) <= {"ENOMEM", "success"}, f"outcomes {outcomes}")
    # The kernel's module loader warns about its own failing allocations; the module must not.
    worse = re.compile(r"\[dm_overlaybd\]|WARNING:|BUG:|INFO:|Oops|KASAN|UBSAN|lockdep")
    equal([row for row in log.lines() if worse.search(row)], [], "complaints")
    log.mark(log.LOOKED)
    loop = dm.Loop(image.zfile(DATA))
    same_bytes(Disk(dm.zfile(loop, "-", len(DATA))).whole(), PADDED, "content after all failures")


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
    """Returns (device, content) for each kind: both algorithms, small and large blocks, several cache options, a
    stack."""
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
    """All or some of the module's allocations fail: reads still return the correct data, by means of the spare buffers.
    Without spare buffers, this test would fail."""
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


def in_pieces(order):
    """Without contiguous pages of this order, a large read still causes one lower read."""
    for algorithm in image.NAMES:
        for block in (4096, 65536):
            raw = image.zfile(DATA, algorithm, block)
            device = dm.create(line(0, dm.sectors(len(DATA)), "zfile", dm.Loop(raw).path, len(raw), 2, "cache_blocks", 0))
            disk = Disk(device)
            end = inject.contiguous_pages(order)
            longest, count = 0, 0
            for at in range(0, len(DATA) - 131072, 131072):
                began = time.monotonic()
                same_bytes(disk.read(at, 131072), DATA[at:at + 131072], f"128 KiB at {at} of {image.NAMES[algorithm]}, {block}")
                longest = max(longest, time.monotonic() - began)
                count += 1
            check(end() > 0, "no allocation failed")
            note(f"{image.NAMES[algorithm]}, {block}: the longest read took {longest * 1000:.0f} ms")
            equal(int(device.info()[5]), count, f"lower reads for {count} reads of 128 KiB")


def start_readers(disk, offsets, length=4096):
    """Starts a thread for each offset, which reads there. Returns the threads, and a dictionary of the data by
    offset."""
    found = {}
    threads = [threading.Thread(target=lambda at=at: found.update({at: disk.read(at, length)})) for at in offsets]
    for thread in threads:
        thread.start()
    return threads, found


def on_slow(milliseconds, *options):
    """Returns a zfile device on a dm-delay device."""
    raw = image.zfile(DATA)
    loop = dm.Loop(raw)
    slow = dm.create(line(0, loop.size // 512, "delay", loop.path, 0, milliseconds))
    return dm.create(line(0, dm.sectors(len(DATA)), "zfile", slow.path, len(raw), len(options), *options))


@test("all reads that wait for memory continue when there is memory again")
def memory_is_back():
    delay, count = 1000, 24
    device = on_slow(delay, "cache_blocks", 0)
    disk = Disk(device)
    offsets = [nth * 8192 for nth in range(count)]
    end = inject.allocations(100)
    start = time.monotonic()
    threads, found = start_readers(disk, offsets)
    # One read at a time has the spare buffer. All others wait for it.
    time.sleep(2.5 * delay / 1000)
    done = len(found)
    took, waiting = time.monotonic() - start, count - done
    check(end() > 0, "no allocation failed")
    check(done <= took * 1000 / delay + 1, f"{done} reads in {took:.1f} s, one read takes {delay} ms")
    check(waiting > count // 2, f"only {waiting} reads wait")
    start = time.monotonic()
    for thread in threads:
        thread.join()
    took = time.monotonic() - start
    note(f"{waiting} reads that waited took {took:.1f} s")
    equal(found, {at: DATA[at:at + 4096] for at in offsets}, "what was read")
    check(took < waiting * delay / 1000 / 2, f"{took:.1f} s, one read takes {delay} ms")


def no_read_ahead(*options):
    """Without memory, a read-ahead fails immediately. It doesn't wait for the spare buffer, where it would delay other
    reads."""
    delay = 500
    device = on_slow(delay, *options)
    disk = Disk(device)
    reads = int(device.info()[5])
    end = inject.allocations(100)
    first, found = start_readers(disk, [0])
    time.sleep(delay / 4000)
    os.posix_fadvise(disk.buffered, 8192, 256 << 10, os.POSIX_FADV_WILLNEED)
    start = time.monotonic()
    second, found_next = start_readers(disk, [8192])
    for thread in first + second:
        thread.join()
    took = time.monotonic() - start
    check(end() > 0, "no allocation failed")
    note(f"{took:.1f} s")
    equal(found | found_next, {0: DATA[:4096], 8192: DATA[8192:12288]}, "what was read")
    equal(int(device.info()[5]) - reads, 2, "reads of the lower device")
    check(took < 6 * delay / 1000, f"{took:.1f} s, one read takes {delay} ms")
    same_bytes(disk.read_buffered(0, len(DATA)), DATA, "the whole device, with memory")


for each, each_block, each_cache in ((image.LZ4, 4096, 0), (image.ZSTD, 65536, 64)):
    add(f"each allocation of a zfile constructor fails in turn ({image.NAMES[each]}, {each_block}, cache {each_cache})",
        zfile_walk, each, each_block, each_cache)
for each_options in (("cache_blocks", 0), ("cache_all",)):
    add(f"a read-ahead doesn't wait for memory ({' '.join(map(str, each_options))})", no_read_ahead, *each_options)
add("all allocations during reads fail: reads succeed", no_memory, inject.allocations, 100)
add("some allocations during reads fail: reads succeed", no_memory, inject.allocations, 30)
add("memory is fragmented into single pages: reads succeed", no_memory, inject.contiguous_pages)
for each_order in (1, 3):
    add(f"no pages of order {each_order} and above: a large read is still one lower read", in_pieces, each_order)


if __name__ == "__main__":
    main()
