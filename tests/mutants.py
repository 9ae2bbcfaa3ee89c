#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Thousands of malformed images, as zfile and lsmt devices: none may give wrong data.

Each is a valid image that was changed in one way (obdtest/mutate.py). A strict reader (obdtest/reader.py) determines
what the kernel has to do: refuse the image with a certain phrase, or make a device, fail the reads of corrupt blocks
with EIO, and return the correct bytes of all others. obdsetup must agree. To examine a case by hand:

 mutants.py --list [WORD]        prints the names of the cases
 mutants.py --write DIR NAME     writes the blobs of a case, lowest layer first, as DIR/0, DIR/1, ...
 mutants.py --verdicts           computes and stores the expected results for later runs
"""

import collections
import errno
import itertools
import mmap
import os
import pickle
import random
import re
import select
import signal
import struct
import subprocess
import sys
import time

from obdtest import dm, image, ktap, mutate, reader, verdicts
from obdtest.disk import Disk, read_or_none
from obdtest.ktap import SAMPLE, Failure, Skip, add, alone, check, defer, equal, main, note, same_bytes, skip_all

WORKERS = 2
# Largest number of different layers in a case.
LAYERS = 3
LEAST = 3000 // SAMPLE // (2 if SAMPLE > 1 else 1)
# One case in FRESH gets new devices, which is slow; the others load their tables into the devices of the case before.
# One case in BY_COMMAND is tested again, on devices made by dmsetup(8), which is slower.
FRESH = 20
BY_COMMAND = 200
# Time limit of a case in seconds, on a slow, emulated, busy machine, without a checker of memory or races.
SLOW = 20
# Time limit of a kind in seconds, on such a machine.
TIMEOUT = 900

TOO_LARGE = "Device is larger than its image"
# Messages that the kernel may log while an image is refused or read.
EXPECTED_LOG = re.compile(r"device-mapper: (table|ioctl): |dm_overlaybd: \d+:\d+: |loop\d+: detected capacity change|"
                          r".*: \d+ callbacks suppressed|obdtest: |clocksource: |hrtimer: interrupt took")
# Bytes after a blob on its loop device. Readers must not use them as a part of the blob.
BEHIND = b"\x5a" * 8192

counts = collections.Counter()


class Bench:
    """The devices of a process: loop devices for the blobs of a case, and mapped devices for its tables."""

    def __init__(self):
        self.loops = [dm.Loop(b"", size=512 << 10) for _ in range(LAYERS)]
        self.mapped = [dm.Device() for _ in range(LAYERS + 1)]
        self.log, self.buffer = dm.KernelLog(), mmap.mmap(-1, 4 << 20)

    def put(self, blobs):
        """Writes the blobs to loop devices, the same blob only once. Returns the devices."""
        places = {}
        for blob in blobs:
            if blob not in places:
                loop = places[blob] = self.loops[len(places)]
                dm.write(loop.fd, blob + BEHIND)
        return [places[blob] for blob in blobs]

    def read(self, fd, sector, count):
        """Returns sectors of a device, or None if the read fails with EIO."""
        view = memoryview(self.buffer)[:count * 512]
        try:
            equal(os.preadv(fd, [view], sector * 512), count * 512, f"bytes read at sector {sector}")
        except OSError as error:
            equal(error.errno, errno.EIO, f"error of a read at sector {sector}")
            return None
        return view

    def load(self, device, table):
        """Loads a table of one line but doesn't resume. Returns the refusal as (phrase, fault), or None."""
        self.log.skip()
        try:
            device.load(table)
            return None
        except OSError as error:
            # Kernels without names of errors log their numbers.
            return self.said(device.number, (f" (-{errno.errorcode[error.errno]})", f" (-{error.errno})"))

    def said(self, number, codes):
        """Waits for the kernel's messages about a refused table, among those about other devices. Returns (phrase,
        fault)."""
        found = None
        for _ in range(1000):
            for line in self.log.lines():
                if line.startswith(f"dm_overlaybd: {number}: "):
                    found = verdicts.told(line.split(": ", 2)[-1])
                elif line.startswith(f"device-mapper: table: {number}: "):
                    check(line.endswith(codes), f"not{codes[0]}: {line}")
                    return line.rpartition(" (")[0].split(": ", 4)[-1], found
            time.sleep(0.005)
        raise Failure("refused with no phrase in the kernel log")


class Commanded:
    """A mapped device that dmsetup(8) makes and resumes when its table is loaded."""

    numbers = itertools.count()

    def __init__(self):
        self.name, self.number = f"obdtest-{os.getpid()}-by-command-{next(self.numbers)}", None
        self.path = f"/dev/mapper/{self.name}"

    def load(self, table):
        done = self._dmsetup("create", self.name, "--readonly", "--table", " ".join(map(str, table)))
        if done.returncode:
            failed = re.search(r"\((\d+:\d+)\) failed: (.*)", done.stderr)
            check(failed, f"dmsetup says: {done.stderr}")
            self.number = failed[1]
            raise next(OSError(code, failed[2]) for code in errno.errorcode if os.strerror(code) == failed[2])
        defer(self._dmsetup, "remove", "--retry", self.name)

    def resume(self):
        """The device is live already."""

    def status(self, **_):
        return [self._dmsetup("status", self.name).stdout.split(maxsplit=3)]

    @staticmethod
    def _dmsetup(*args):
        return subprocess.run(["dmsetup", *args], capture_output=True, text=True, check=False)


def set_up(bench, verdict, devices):
    """Returns (device of the case with a loaded table, None), or (None, refusal)."""
    case = verdict.case
    loops = bench.put(case.blobs)
    layers, made = [], {}
    for loop, blob, size in zip(loops, case.blobs, verdict.zfiles):
        if size is None:
            layers.append((loop, len(blob)))
            continue
        if loop not in made:
            made[loop] = device = devices[len(made)]
            refusal = bench.load(device, dm.line(0, max(dm.sectors(size), 1), "zfile", loop.path, len(blob)))
            if refusal:
                return None, refusal
            check_memory(device, len(blob), 4)
            if case.target == "zfile":
                return device, None
            device.resume()
        layers.append((made[loop], size))
    words = [word for device, size in layers for word in (device.path, size)]
    size = max(dm.sectors(verdict.wanted.size), 1) if isinstance(verdict.wanted, verdicts.Disk) else 1
    refusal = bench.load(devices[-1], dm.line(0, size, "lsmt", len(layers), *words))
    if refusal:
        return None, refusal
    check_memory(devices[-1], sum(words[1::2]), 3)
    return devices[-1], None


def check_memory(device, size, field):
    """Checks that a table takes no more memory than an index of the blob's size can need."""
    memory = int(device.status(inactive=True)[0][3].split()[field])
    check(memory <= 4 * size + 64, f"a table of {memory} bytes for {size} bytes")


def one_case(bench, verdict, make_device=None):
    """Checks a case, on new devices or existing ones. Returns the outcome."""
    check(not verdict.quarrel, f"obdsetup disagrees: {verdict.quarrel}")
    layers = sum(size is not None for size in verdict.zfiles)
    devices = [make_device() for _ in range(layers + 1)] if make_device else bench.mapped
    device, refusal = set_up(bench, verdict, devices)
    wanted = verdict.wanted
    phrase, told = wanted if isinstance(wanted, verdicts.Refused) else (None, None)
    # Valid differences from obdsetup: device-mapper has no disk of 0 sectors; and if the disk ends within a sector,
    # the kernel's lsmt target reads that sector when the table is loaded.
    if 0 in verdict.zfiles or phrase is None and not wanted.size:
        phrase = TOO_LARGE
    elif phrase is None and wanted.tail_is_corrupt:
        phrase = reader.CANNOT_READ
    if refusal:
        equal(refusal[0], phrase, "refused with")
        # For a corrupt block of the lower device, only obdsetup has details.
        if refusal[0] not in (reader.CANNOT_READ, reader.NOT_ZFILE, TOO_LARGE):
            equal(refusal[1], told, "field, place and expectation in the kernel log")
        return "refused"
    check(phrase is None, f"not refused, with '{phrase}'")
    device.resume()
    fd = os.open(device.path, os.O_RDONLY | os.O_DIRECT)
    try:
        equal(os.lseek(fd, 0, os.SEEK_END), dm.sectors(wanted.size) * 512, "size of the device")
        outcome = read_all(bench, fd, wanted)
    finally:
        os.close(fd)
    return outcome


def read_all(bench, fd, wanted):
    """Reads whole windows, pieces, and parts of blocks. Returns the outcome."""
    corrupt = False
    for start, end in wanted.windows:
        pieces = [piece for piece in wanted.pieces if start <= piece[0] < end]
        bad = any(data is None for _, _, data in pieces)
        corrupt = corrupt or bad
        whole = bench.read(fd, start, end - start)
        equal(whole is None, bad, f"sectors {start} to {end} fail")
        if not bad:
            same(whole, b"".join(data for _, _, data in pieces), start)
        for sector, count, data in pieces:
            # The whole piece, unless the window was read, and one sector of it, usually a part of a block.
            for at, length in [(sector, count)] * bad + [(sector + (7 * sector + count) % count, 1)]:
                got = bench.read(fd, at, length)
                equal(got is None, data is None, f"{length} sectors at {at} fail")
                if got is not None:
                    same(got, data[(at - sector) * 512:(at - sector + length) * 512], at)
    return "read with errors" if corrupt else "read"


def same(got, wanted, sector):
    if got != wanted:
        same_bytes(bytes(got), wanted, f"{len(wanted)} bytes at sector {sector}")


# ---- many cases at the same time ----

def in_processes(cases, log):
    """Checks cases in processes. Returns (number of the case, outcome, failure, seconds)."""
    pids, pipes, results = [], [], []
    try:
        for nth in range(WORKERS):
            reading, writing = os.pipe()
            pid = os.fork()
            if not pid:
                work_and_exit(cases, range(nth, len(cases), WORKERS), writing)
            os.close(writing)
            pids.append(pid)
            pipes.append(os.fdopen(reading, "rb"))
        left = list(pipes)
        while left:
            for pipe in select.select(left, [], [], 0.1)[0]:
                results += pickle.load(pipe)
                left.remove(pipe)
            look_at(log)
        return results
    except BaseException:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for pid, pipe in zip(pids, pipes):
            pipe.close()
            os.waitpid(pid, 0)


def look_at(log):
    """Checks the kernel's messages now: when run.sh checks the log, it may have lost the first of them."""
    for line in log.lines():
        check(EXPECTED_LOG.match(line), f"kernel log: {line}")


def work_and_exit(cases, numbers, pipe):
    """Checks the cases with these numbers, writes the results to the pipe, and ends the process."""
    signal.alarm(0)
    results = []
    try:
        alone(work, cases, numbers, results)
    except Exception as error:  # pylint: disable=broad-except
        results.append((None, None, f"{type(error).__name__}: {error}", 0))
    with os.fdopen(pipe, "wb") as file:
        pickle.dump(results, file)
    os._exit(0)


def work(cases, numbers, results):
    bench = Bench()
    for number in numbers:
        results.append((number, *tried(bench, cases[number], None if number % FRESH else dm.Device)))


def tried(bench, case, make_device):
    """Checks a case. Returns outcome, failure and seconds."""
    start, outcome, failure = time.monotonic(), None, None
    try:
        outcome = alone(one_case, bench, case, make_device)
    except Failure as error:
        failure = str(error)
    except OSError as error:
        failure = f"{type(error).__name__}: {error}"
    return outcome, failure, time.monotonic() - start


def one_kind(kind):
    cases = verdicts.load(kind)
    log = dm.KernelLog()
    results = in_processes(cases, log)
    # Sequentially: the device number of a device that dmsetup failed to make may be reused immediately.
    bench = Bench()
    for number in range(1, len(cases), BY_COMMAND):
        results.append((number, *tried(bench, cases[number], Commanded)))
    look_at(log)
    log.mark()
    failures = [(cases[number].case.name if number is not None else kind, failure)
                for number, _, failure, _ in results if failure]
    for name, failure in failures[:20]:
        note(f"{name}: {failure}")
    counts.update(outcome or "failed" for number, outcome, _, _ in results[:len(cases)])
    equal(len(failures), 0, "cases that failed")
    seconds, number = max((seconds, number) for number, _, _, seconds in results)
    check(seconds < SLOW * ktap.SLOW, f"{cases[number].case.name} took {seconds:.1f} s")


def every_bit(algorithm, block):
    """An image of copies of one block, each with another bit flipped; every eighth copy is unchanged."""
    rng = random.Random(block)
    data = b"".join(rng.randbytes(20) + b"overlaybd " * (block // 60) for _ in range(9))[:block].ljust(block, b"\0")
    payload = image.compress(algorithm, data)
    good = payload + struct.pack("<I", image.crc32c(image.BLOCK_SEED, payload))
    bits = iter(range(8 * len(good)))
    stored = []
    while (bit := next(bits, None)) is not None:
        if len(stored) % 8 == 0:
            stored.append(good)
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        stored.append(bytes(flipped))
    raw = image.zfile_of(stored, len(stored) * block, algorithm, block)
    disk = Disk(dm.zfile(dm.Loop(raw), len(raw), len(stored) * block))
    for nth in range(len(stored)):
        got = read_or_none(disk, nth * block, block)
        if stored[nth] == good:
            same_bytes(got or b"", data, f"block {nth}, which is unchanged")
            continue
        check(got is None, f"block {nth} of {len(good)} bytes, with a bit flipped, was read")
        if nth % 4 == 1:
            part = read_or_none(disk, nth * block + 512 * (nth % (block // 512)), 512)
            check(part is None, f"a part of block {nth}, with a bit flipped, was read")
    note(f"{8 * len(good)} bits")


def enough():
    note(f"{sum(counts.values())} malformed images: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    check(sum(counts.values()) >= LEAST, "too few malformed images")
    for outcome in ("refused", "read", "read with errors"):
        check(counts[outcome], f"no image was {outcome}")


def by_hand(option, *args):
    """Lists cases, or writes the blobs of one."""
    if option == "--verdicts":
        verdicts.kinds()
        return
    directory, word = (args[0], args[1]) if option == "--write" else (None, "".join(args))
    for case in (case for _, cases in mutate.cases() for case in cases):
        if directory and case.name == word:
            os.makedirs(directory, exist_ok=True)
            for nth, blob in enumerate(case.blobs):
                with open(f"{directory}/{nth}", "wb") as file:
                    file.write(blob)
            return
        if not directory and word in case.name:
            print(case.name)
    if directory:
        sys.exit(f"there is no case {word}")


def declare():
    """Declares the tests."""
    for kind in verdicts.kinds():
        add(f"malformed images: {kind}", one_kind, kind, timeout=TIMEOUT, alike=True)
    add(f"at least {LEAST} malformed images were tested, with every kind of outcome", enough)
    for algorithm, name in image.NAMES.items():
        for block in (512, 4096, 16384):
            add(f"each single bit of a block of {block} bytes flipped, {name}", every_bit, algorithm, block, alike=True)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("--"):
        by_hand(*sys.argv[1:])
    else:
        try:
            declare()
        except Skip as skip:
            skip_all(skip)
        main()
