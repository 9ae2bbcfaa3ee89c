#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Suspending, reloading and removing devices, leaks of memory, and unloading the module."""

import errno
import os
import random
import subprocess
import threading
import time

from obdtest import dm, image, stack
from obdtest.disk import Disk, fails_with, verify, verify_random
from obdtest.dm import line
from obdtest.ktap import SLOW, Failure, alone, check, defer, equal, main, same_bytes, test
from obdtest.memory import grown_after
from obdtest.module import MODULE, module_file, use_count

DATA = image.sample(300000, 41)
PADDED = DATA + bytes(-len(DATA) % 512)
LENGTH = dm.sectors(len(DATA))
RAW = image.zfile(DATA)
VSIZE = 256 << 10
LAYER = image.lsmt(VSIZE, [(0, image.sample(200 * 512, 42)), (300, 20)])
# Kernels with checkers free memory late, and find leaks themselves after the script: test only a few rounds there.
ROUNDS = 30 if SLOW == 1 else 2


class Readers:
    """Threads that read and compare until join() is called."""

    def __init__(self, device, wanted, count=3):
        self.errors, self.reads, self.stop = [], 0, False
        self.threads = [threading.Thread(target=self._read, args=(device, wanted, seed)) for seed in range(count)]
        for thread in self.threads:
            thread.start()

    def _read(self, device, wanted, seed):
        rng = random.Random(seed)
        disk = Disk(device)
        try:
            while not self.stop:
                verify_random(disk, wanted, rng, 4)
                self.reads += 4
        except (Failure, OSError) as error:
            self.errors.append(error)
        disk.close()

    def join(self):
        self.stop = True
        for thread in self.threads:
            thread.join()
        check(not self.errors, f"readers: {self.errors[:1]}")
        check(self.reads > 20, f"only {self.reads} reads")


@test("suspend and resume under load, with and without flush")
def suspend_resume():
    for device, wanted in ((dm.zfile(dm.Loop(RAW), len(RAW), len(DATA)), PADDED),
                           (stack.open_stack(LAYER), image.flatten([image.Lsmt(LAYER)]))):
        readers = Readers(device, wanted)
        for nth in range(12):
            device.suspend(noflush=bool(nth % 2))
            time.sleep(0.01)
            device.resume()
            time.sleep(0.02)
        readers.join()


@test("a read of a suspended device waits for resume")
def suspended_read():
    device = dm.zfile(dm.Loop(RAW), len(RAW), len(DATA))
    disk = Disk(device)
    device.suspend()
    got = []
    thread = threading.Thread(target=lambda: got.append(disk.read(4096, 8192)))
    thread.start()
    time.sleep(0.2)
    equal(got, [], "reads that ended while suspended")
    device.resume()
    thread.join()
    same_bytes(got[0], DATA[4096:12288], "content")


@test("reload under load: ZFiles of other formats with the same data, many times")
def reload():
    blobs = [dm.Loop(image.zfile(DATA, algorithm, block)) for algorithm in image.NAMES for block in (512, 4096, 65536)]
    tables = [line(0, LENGTH, "zfile", blob.path, "-") for blob in blobs]
    device = dm.create(tables[0])
    readers = Readers(device, PADDED)
    for nth in range(18):
        device.load(tables[nth % len(tables)])
        device.resume()
        time.sleep(0.01)
    readers.join()
    equal(device.deps(), [blobs[17 % len(blobs)].number], "device below")
    verify(device, PADDED, rounds=20)


@test("reload to a larger image; a refused or cleared table leaves the live one")
def reload_other():
    small, large = image.sample(50000, 1), image.sample(120000, 2)
    raws = [image.zfile(data) for data in (small, large)]
    loops = [dm.Loop(raw) for raw in raws]
    lines = [line(0, dm.sectors(len(data)), "zfile", loop.path, len(raw))
             for data, loop, raw in zip((small, large), loops, raws)]
    device = dm.create(lines[0])
    device.load(lines[1])
    equal(device.status(dm.TABLE, inactive=True)[0][1], lines[1][1], "length of the loaded table")
    verify(device, small + bytes(-len(small) % 512), rounds=5)
    device.resume()
    verify(device, large + bytes(-len(large) % 512), rounds=5)
    fails_with(errno.EINVAL, device.load, line(0, 1, "zfile", loops[0].path, 100))
    verify(device, large + bytes(-len(large) % 512), rounds=5)
    device.load(lines[0])
    device.clear()
    device.resume()
    verify(device, large + bytes(-len(large) % 512), rounds=5)


@test("remove while open is refused with EBUSY")
def busy():
    device = dm.zfile(dm.Loop(RAW), len(RAW), len(DATA))
    disk = Disk(device)
    fails_with(errno.EBUSY, device.try_remove)
    same_bytes(disk.read(0, 4096), DATA[:4096], "content")
    below = stack.open_stack(image.zfile(LAYER))
    lower = [name for name in os.listdir("/sys/block") if
             os.listdir(f"/sys/block/{name}/holders") == [os.path.basename(below.path)]]
    equal(len(lower), 1, "devices below")
    with open(f"/sys/block/{lower[0]}/dm/name", encoding="ascii") as file:
        name = file.read().strip()
    run = subprocess.run(["dmsetup", "remove", name], capture_output=True, text=True, check=False)
    check(run.returncode and "busy" in run.stderr.lower(), f"removal of the device below: {run.stderr!r}")


@test("deferred removal: the device stays until it is closed")
def deferred():
    device = dm.zfile(dm.Loop(RAW), len(RAW), len(DATA))
    disk = Disk(device)
    device.try_remove(deferred=True)
    check(device.exists(), "the device is gone although it is open")
    same_bytes(disk.read(0, 65536), DATA[:65536], "content")
    disk.close()
    for _ in range(100):
        if not device.exists():
            break
        time.sleep(0.02)
    check(not device.exists(), "the device is still there")


@test("removal of a device with an inactive table, and of one that was never resumed")
def unused_tables():
    loop = dm.Loop(RAW)
    for resumed in (False, True):
        device = dm.Device()
        device.load(line(0, LENGTH, "zfile", loop.path, len(RAW)))
        if resumed:
            device.resume()
            device.load(line(0, 1, "zfile", loop.path, len(RAW)))
        device.remove()
        check(not device.exists(), "the device is still there")
    equal(use_count(), 0, "use count of the module")


@test("creating devices, failed attempts, and removing devices leak no memory")
def no_leak():
    # The same block many times: the image is small, its jump table isn't.
    payload = image.compress(image.LZ4, bytes(4096))
    raw = image.zfile_of([payload] * 200000, 200000 * 4096, crc=False)
    loop = dm.Loop(raw)
    device = dm.zfile(loop, len(raw), 200000 * 4096)
    table = int(device.info()[4])
    device.remove()
    check(table > 300000, f"the table has {table} bytes")

    def cycle():
        device = dm.zfile(loop, len(raw), 200000 * 4096)
        Disk(device).read(1 << 20, 4096)
        device.load(line(0, 8, "zfile", loop.path, len(raw)))

    def failing():
        fails_with(errno.EINVAL, dm.create, line(0, 8, "zfile", loop.path, len(raw)), line(8, 8, "zfile", "-"))

    for function in (cycle, failing):
        grown = grown_after(ROUNDS, function)
        check(grown < ROUNDS * table / 1024 / 2 or SLOW > 1, f"{function.__name__}: {grown} KiB more")
    entries = [image.lsmt_entry(sector * 2, 1, 8) for sector in range(100000)]
    layer = image.lsmt_of(entries, bytes(512), 200000 * 512)
    layers = [(dm.Loop(layer), len(layer))] * 2
    grown = grown_after(ROUNDS // 2, dm.lsmt, 200000 * 512, *layers)
    check(grown < ROUNDS // 2 * 1600 / 2 or SLOW > 1, f"lsmt: {grown} KiB more")
    equal(use_count(), 0, "use count of the module")


@test("four threads create and remove devices concurrently")
def parallel():
    errors = []

    def worker():
        try:
            for _ in range(12):
                loop_device = dm.zfile(loop, len(RAW), len(DATA))
                disk = Disk(loop_device)
                same_bytes(disk.read(8192, 8192), DATA[8192:16384], "content")
                disk.close()
                loop_device.remove()
        except (Failure, OSError) as error:
            errors.append(error)

    loop = dm.Loop(RAW)
    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(not errors, f"{errors[:1]}")


@test("the module can't be unloaded while a device exists; the device still reads")
def module():
    device = dm.zfile(dm.Loop(RAW), len(RAW), len(DATA))
    check(use_count() > 0, "the module isn't in use")
    run = subprocess.run(["rmmod", "dm_overlaybd"], capture_output=True, text=True, check=False)
    check(run.returncode and "in use" in run.stderr, f"rmmod: {run.stderr!r}")
    same_bytes(Disk(device).whole(), PADDED, "content")
    loaded = Disk(device)
    loaded.close()
    device.suspend()
    device.resume()


@test("unloading and loading the module again, five times")
def module_again():
    path = module_file()
    defer(lambda: os.path.exists(MODULE) or subprocess.run(["insmod", path], check=True))
    for _ in range(5):
        equal(use_count(), 0, "use count")
        subprocess.run(["rmmod", "dm_overlaybd"], check=True)
        check(not os.path.exists(MODULE), "the module is still loaded")
        fails_with(errno.EINVAL, dm.zfile, dm.Loop(RAW), len(RAW), len(DATA))
        subprocess.run(["insmod", path], check=True)
        alone(lambda: verify(dm.zfile(dm.Loop(RAW), len(RAW), len(DATA)), PADDED, rounds=5))


if __name__ == "__main__":
    main()
