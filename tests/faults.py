#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Faults of lower devices: dm-error, dm-flakey, dm-dust, dm-delay, fault injection, and disks that are removed. Each
read ends within BOUND seconds, with the right bytes or with an error, never with wrong bytes. Once the fault is gone,
reads succeed."""

import errno
import random
import threading
import time

from obdtest import dm, image, inject, machine
from obdtest.disk import Disk, same_bytes, verify
from obdtest.dm import line
from obdtest.ktap import SLOW, add, alone, check, equal, main, note, test
from obdtest.programs import need_module

# Time limit for each read in seconds. It is long because the machine may be emulated.
BOUND = 10 * SLOW

DATA = image.sample(300000, 81)
PADDED = DATA + bytes(-len(DATA) % 512)
VSIZE = 256 << 10
LAYER = image.lsmt(VSIZE, [(0, image.sample(100 * 512, 82)), (200, image.sample(250 * 512, 83))])
PLAIN = image.flatten([image.Lsmt(LAYER)])


class Lower:
    """A linear device over a blob. Its table can be replaced by one with a fault while the device is in use."""

    def __init__(self, raw):
        self.loop = dm.Loop(raw)
        self.raw, self.sectors = raw, self.loop.size // 512
        self.good = line(0, self.sectors, "linear", self.loop.path, 0)
        self.device = dm.create(self.good)

    def swap(self, *table):
        self.device.load(*table)
        self.device.resume()

    def mend(self):
        self.swap(self.good)


class Victim:
    """A kind of device to test. open() makes it on lower devices that can be made to fail. `wanted` is its content."""

    def __init__(self, title, raws, open_device, wanted):
        self.title, self.raws, self.open_device, self.wanted = title, raws, open_device, wanted

    def open(self):
        lowers = [Lower(raw) for raw in self.raws]
        return lowers, self.open_device(*[lower.device for lower in lowers])


def uncached(lower, raw, size):
    """Returns a zfile device without a cache, so that each read of the device reads the lower device."""
    return dm.create(line(0, dm.sectors(size), "zfile", lower.path, len(raw), 1, "cache_none"))


def zfile_on(raw, size):
    return lambda lower: uncached(lower, raw, size)


def layer_on(raw):
    return lambda lower: dm.lsmt(VSIZE, (lower, len(raw)))


def stack_on(raw):
    return lambda lower: dm.lsmt(VSIZE, (uncached(lower, raw, len(LAYER)), len(LAYER)))


def victims():
    lz4, zstd = image.zfile(DATA), image.zfile(DATA, image.ZSTD, 65536)
    packed = image.zfile(LAYER, image.ZSTD)
    return [Victim("zfile, LZ4 in 4 KiB", [lz4], zfile_on(lz4, len(DATA)), PADDED),
            Victim("zfile, zstd in 64 KiB", [zstd], zfile_on(zstd, len(DATA)), PADDED),
            Victim("lsmt", [LAYER], layer_on(LAYER), PLAIN),
            Victim("lsmt over zfile", [packed], stack_on(packed), PLAIN)]


class Readers:
    """Threads that read at random places until stopped, and count the results."""

    def __init__(self, device, wanted, count=4):
        self.wanted, self.stop = wanted, threading.Event()
        self.good = self.failed = 0
        self.slowest, self.wrong, self.errors = 0.0, [], set()
        self.lock = threading.Lock()
        self.disk = Disk(device)
        self.threads = [threading.Thread(target=self._read, args=(seed,), daemon=True) for seed in range(count)]
        for thread in self.threads:
            thread.start()

    def _read(self, seed):
        rng = random.Random(seed)
        while not self.stop.is_set():
            length = rng.choice((512, 4096, 4096, 12288, 65536))
            offset = rng.randrange((len(self.wanted) - length) // 512) * 512
            start = time.monotonic()
            try:
                data = self.disk.read(offset, length)
            except OSError as error:
                data = error.errno
            took = time.monotonic() - start
            if isinstance(data, int):
                # For each error, the kernel prints a line to a slow console: wait for the console.
                time.sleep(0.02)
            with self.lock:
                self.slowest = max(self.slowest, took)
                if isinstance(data, int):
                    self.failed += 1
                    self.errors.add(errno.errorcode[data])
                elif data == self.wanted[offset:offset + length]:
                    self.good += 1
                else:
                    self.wrong.append(offset)

    def join(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(BOUND)
            check(not thread.is_alive(), f"a read has not ended after {BOUND} s")
        self.disk.close()
        equal(self.wrong, [], "byte offsets of reads with wrong data")
        check(self.slowest < BOUND, f"a read took {self.slowest:.1f} s")
        return self


def for_seconds(device, wanted, seconds, count=4):
    """Reads for some seconds. Returns the stopped Readers."""
    readers = Readers(device, wanted, count)
    time.sleep(seconds)
    return readers.join()


def soon(condition):
    """Waits until the condition is true, for 60 * SLOW seconds at most. Returns whether it is."""
    for _ in range(1200 * SLOW):
        if condition():
            return True
        time.sleep(0.05)
    return False


# ---- dm-error, dm-flakey ----

def comes_and_goes(victim, bad_line):
    """A fault appears and disappears under load, several times."""
    (lower,), device = victim.open()
    readers = Readers(device, victim.wanted)
    for _ in range(5):
        lower.swap(bad_line(lower))
        failed = readers.failed
        check(soon(lambda failed=failed: readers.failed > failed + 3), "no read fails")
        lower.mend()
        # Each reader may have one more read in flight that fails.
        time.sleep(0.1)
        failed, good = readers.failed + len(readers.threads), readers.good
        check(soon(lambda good=good: readers.good > good + 10), "no read succeeds")
        check(readers.failed <= failed, "reads fail although the fault is gone")
    readers.join()
    equal(readers.errors, {"EIO"}, "errors")
    verify(device, victim.wanted, rounds=20)


def flakey(lower, *features):
    """Returns a table line of dm-flakey without an up interval, so that the features apply all the time."""
    return line(0, lower.sectors, "flakey", lower.loop.path, 0, 0, 3600, len(features), *features)


def error_target(victim):
    comes_and_goes(victim, lambda lower: line(0, lower.sectors, "error"))


def flakey_reads(victim):
    need_module("dm-flakey")
    comes_and_goes(victim, lambda lower: flakey(lower, "error_reads"))


def flakey_corrupts(victim):
    """The lower device returns data with random changes: a read of a ZFile with CRCs never returns such data."""
    need_module("dm-flakey")
    (lower,), device = victim.open()
    lower.swap(flakey(lower, "random_read_corrupt", 500000000))
    readers = Readers(device, victim.wanted)
    soon(lambda: readers.failed > 20 and readers.good > 5)
    readers.join()
    check(readers.failed > 20 and readers.good > 5, f"{readers.good} good, {readers.failed} failed reads")
    equal(readers.errors, {"EIO"}, "errors")
    lower.mend()
    verify(device, victim.wanted, rounds=20)


# ---- dm-dust ----

def needs_any(victim, start, end, sectors):
    """Returns whether a read of the bytes from `start` up to `end` of a device under test needs one of the sectors
    `sectors` of its lower device."""
    raw, ranges = victim.raws[0], [(start, end)]
    if raw[:24] != image.MAGIC or "lsmt" in victim.title:
        layer = image.Lsmt(LAYER)
        ranges = [((moffset + max(start // 512 - offset, 0)) * 512, (moffset + min(end // 512 - offset, length)) * 512)
                  for offset, length, moffset, zeroed in layer.entries
                  if not zeroed and offset < end // 512 and start // 512 < offset + length]
    if raw[:24] == image.MAGIC:
        blob = image.Zfile(raw)
        places = blob.places()
        ranges = [(places[nth][0], sum(places[nth])) for first, behind in ranges
                  for nth in range(first // blob.block, min(-(-behind // blob.block), blob.count))]
    return any(first // 512 <= sector <= (behind - 1) // 512 for first, behind in ranges for sector in sectors)


def dust(victim):
    """With some bad sectors, exactly the reads that need one of them fail. Once dm-dust is disabled, all reads
    succeed."""
    need_module("dm-dust")
    (lower,), device = victim.open()
    lower.swap(line(0, lower.sectors, "dust", lower.loop.path, 0, 512))
    rng = random.Random(5)
    bad = rng.sample(range(8, lower.sectors - 16), 12)
    for sector in bad:
        lower.device.message(f"addbadblock {sector}")
    lower.device.message("enable")
    disk = Disk(device)
    outcome = []
    for at in range(0, disk.size - 4096, 4096):
        start = time.monotonic()
        try:
            same_bytes(disk.read(at, 4096), victim.wanted[at:at + 4096], f"4096 at {at}")
            outcome.append(True)
        except OSError as error:
            equal(error.errno, errno.EIO, f"error at {at}")
            outcome.append(False)
        check(time.monotonic() - start < BOUND, f"the read at {at} took too long")
    disk.close()
    equal(outcome, [not needs_any(victim, at, at + 4096, bad) for at in range(0, disk.size - 4096, 4096)],
          "which reads succeed")
    lower.device.message("disable")
    verify(device, victim.wanted, rounds=20)


# ---- dm-delay ----

def delay(victim):
    """On a slow lower device, reads are slow, but correct, and do not wait for each other."""
    need_module("dm-delay")
    (lower,), device = victim.open()
    lower.swap(line(0, lower.sectors, "delay", lower.loop.path, 0, 40))
    readers = for_seconds(device, victim.wanted, 1.5, count=12)
    equal((readers.failed, readers.errors), (0, set()), "failed reads")
    check(readers.slowest >= 0.04, f"no read took longer than {readers.slowest:.3f} s")
    check(readers.good > 12, f"{readers.good} reads in 1.5 s")
    # Suspend and resume while reads are in flight.
    readers = Readers(device, victim.wanted)
    for _ in range(5):
        device.suspend()
        device.resume()
    readers.join()
    equal(readers.failed, 0, "failed reads")
    lower.mend()
    verify(device, victim.wanted, rounds=20)


# ---- fail_make_request ----

def failing_requests(victim):
    (lower,), device = victim.open()
    end = inject.requests(lower.device, probability=40)
    readers = Readers(device, victim.wanted)
    soon(lambda: readers.failed > 20 and readers.good > 20)
    readers.join()
    check(readers.failed > 3 and readers.good > 3, f"{readers.good} good, {readers.failed} failed reads")
    equal(readers.errors, {"EIO"}, "errors")
    end()
    verify(device, victim.wanted, rounds=20)


# ---- one layer of several ----

@test("lsmt: a layer that fails doesn't fail sectors of other layers")
def one_layer():
    below = image.lsmt(VSIZE, [(0, image.sample(VSIZE, 84))])
    above = image.lsmt(VSIZE, [(100, image.sample(64 * 512, 85)), (300, image.sample(64 * 512, 86))])
    lowers = [Lower(below), Lower(above)]
    wanted = image.flatten([image.Lsmt(below), image.Lsmt(above)])
    device = dm.lsmt(VSIZE, *[(lower.device, len(lower.raw)) for lower in lowers])
    for nth, covers in ((1, lambda sector: 100 <= sector < 164 or 300 <= sector < 364),
                        (0, lambda sector: not (100 <= sector < 164 or 300 <= sector < 364))):
        lowers[nth].swap(line(0, lowers[nth].sectors, "error"))
        disk = Disk(device)
        for sector in range(0, VSIZE // 512, 3):
            try:
                data = disk.read(sector * 512, 512)
            except OSError as error:
                equal((error.errno, covers(sector)), (errno.EIO, True), f"sector {sector} fails")
            else:
                check(not covers(sector), f"the read of sector {sector} succeeded, but its layer fails")
                same_bytes(data, wanted[sector * 512:sector * 512 + 512], f"sector {sector}")
        disk.close()
        lowers[nth].mend()
    verify(device, wanted, rounds=20)


# ---- devices that disappear ----

@test("a loop device that is detached while in use: reads still succeed")
def detached():
    for victim in victims():
        def once(victim=victim):
            loop = dm.Loop(victim.raws[0])
            device = victim.open_device(loop)
            readers = Readers(device, victim.wanted)
            loop.clear()
            time.sleep(0.2)
            readers.join()
            # The kernel detaches the loop device only when its last user closes it.
            equal(readers.failed, 0, f"{victim.title}: failed reads")
        alone(once)


def errors_of(device, sector):
    """Returns the name of the error of a read of one sector, None if it succeeds."""
    disk = Disk(device)
    try:
        disk.read(sector * 512, 512)
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        disk.close()
    return None


def pulled(kind, victim):
    """A disk of the machine is pulled out under load."""
    disk = machine.Disk(kind, victim.raws[0])
    device = victim.open_device(disk)
    verify(device, victim.wanted, rounds=10)
    readers = Readers(device, victim.wanted)
    time.sleep(0.2)
    disk.pull()
    failed = readers.failed
    soon(lambda: readers.failed > failed + 10)
    readers.join()
    check(readers.failed > failed + 3, f"{readers.failed} reads failed")
    check(readers.errors <= {"EIO", "ENODEV"}, f"errors {readers.errors}")
    target = device.status()[0][2]
    check(target in ("zfile", "lsmt"), f"the status is of target {target!r}")
    device.suspend()
    device.resume()
    device.remove()
    check(not device.exists(), "the device is still there")


def medium_errors(kind):
    """If a device on a disk reads a bad sector, its read fails with the same error as the disk."""
    raw = image.zfile(DATA)
    bad = 41
    disk = machine.Disk(kind, raw, bad_sectors=[bad])
    wanted = errors_of(machine.linear(disk), bad)
    note(f"{kind}: the read of a bad sector fails with {wanted}")
    check(wanted is not None, "the bad sector can be read")
    device = dm.zfile(disk, len(raw), len(DATA))
    block = next(nth for nth, (at, length) in enumerate(image.Zfile(raw).places())
                 if at // 512 <= bad <= (at + length - 1) // 512)
    equal(errors_of(device, block * 8), wanted, "error of the zfile device")
    linear = dm.create(line(0, 1, "linear", disk.path, bad))
    equal(errors_of(linear, 0), wanted, "error of the linear device")
    bare = machine.Disk(kind, LAYER, bad_sectors=[20])
    device = dm.lsmt(VSIZE, (bare, len(LAYER)))
    equal(errors_of(device, 20 - 8), wanted, "error of the lsmt device")
    same_bytes(Disk(device).read(0, 512), PLAIN[:512], "the first sector")
    if kind == "nvme":
        check(wanted != "EIO", "the disk fails with EIO, so this does not show that errors are unchanged")


for each in victims():
    add(f"{each.title}: dm-error comes and goes", error_target, each, timeout=400)
    add(f"{each.title}: dm-flakey, reads fail", flakey_reads, each, timeout=400)
    if "zfile" in each.title:
        add(f"{each.title}: dm-flakey, data is corrupted", flakey_corrupts, each, timeout=400)
    add(f"{each.title}: dm-dust, bad sectors", dust, each)
    add(f"{each.title}: dm-delay", delay, each)
    add(f"{each.title}: fail_make_request", failing_requests, each)
    add(f"nvme: {each.title}: the disk is pulled out under load", pulled, "nvme", each)
# The last device of the loop also on a SCSI disk.
add(f"scsi: {each.title}: the disk is pulled out under load", pulled, "scsi", each)
for each_kind in ("nvme", "scsi"):
    add(f"{each_kind}: a medium error is passed up unchanged", medium_errors, each_kind)


if __name__ == "__main__":
    main()
