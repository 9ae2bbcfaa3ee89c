#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A random mix of everything for OBD_SOAK_MINUTES minutes (default: 1). It consists of episodes of some seconds. Each
has a new stack, readers that verify, and some troubles: faults of lower devices, no memory, reloads, other devices.

A read may fail only if a fault was active at some time during the read. OBD_SOAK_SEED repeats an episode by its seed,
apart from the timing.
"""

import collections
import errno
import os
import random
import subprocess
import threading
import time

from obdtest import dm, image, inject
from obdtest.disk import Disk, same_bytes, verify, verify_random
from obdtest.dm import line
from obdtest.ktap import SLOW, Failure, add, alone, check, equal, main, note
from obdtest.memory import hog, kernel_memory
from obdtest.programs import need_module

MINUTES = float(os.environ.get("OBD_SOAK_MINUTES", "1"))
SECONDS = 12
# Time limit in seconds for all threads to end after they were told to stop.
BOUND = 30 * SLOW


class Lower:
    """A blob on a linear device whose table can be replaced while it is used."""

    def __init__(self, raw):
        self.loop = dm.Loop(raw)
        self.raw, self.sectors = raw, self.loop.size // 512
        self.device = dm.create(self.good())

    def good(self):
        return line(0, self.sectors, "linear", self.loop.path, 0)

    def swap(self, table):
        self.device.load(table)
        self.device.resume()


def describe(counts):
    return ", ".join(f"{what}: {number}" for what, number in sorted(counts.items()))


def unless_late(function, *args):
    """Calls suspend() or resume(). Ignores EINVAL, which a concurrent call of another thread causes."""
    try:
        function(*args)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


class Scene:
    """A stack of random layers, and its expected content."""

    def __init__(self, rng):
        self.rng, self.stop = rng, threading.Event()
        self.lock = threading.Lock()
        self.active = {errno.EIO: 0, errno.ENOMEM: 0}
        self.changes = dict(self.active)
        self.counts = {}
        self.size = rng.choice((64 << 10, 256 << 10, 1 << 20, 3 << 20))
        raws = [image.lsmt(self.size, image.random_layer(rng, self.size, rng.randrange(1, 60), unit=rng.choice((1, 8))))
                for _ in range(rng.randrange(1, 6))]
        self.wanted = image.flatten([image.Lsmt(raw) for raw in raws])
        self.lowers, self.zfiles, layers = [], [], []
        for raw in raws:
            if rng.randrange(4):
                packed = image.zfile(raw, rng.choice(list(image.NAMES)), rng.choice((512, 4096, 16384, 65536)))
                lower = Lower(image.tar(packed) if rng.randrange(2) else packed)
                options = ["cache_blocks", rng.choice((0, 8, 64))] if rng.randrange(4) else []
                options += ["cache_all"] * rng.randrange(2)
                args = [lower.device.path, len(lower.raw), len(options), *options]
                table = line(0, dm.sectors(len(raw)), "zfile", *args)
                device = dm.create(table)
                self.zfiles.append((device, table, raw))
            else:
                lower = Lower(raw)
                device = lower.device
            self.lowers.append(lower)
            layers += [device.path, len(raw)]
        self.table = line(0, self.size // 512, "lsmt", len(raws), *layers)
        self.device = dm.create(self.table)

    def count(self, what, number=1):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + number

    def pause(self, rng, most=0.3):
        """Waits for up to `most` seconds. Returns False if the thread is to stop."""
        return not self.stop.wait(rng.random() * most)

    def trouble(self, error, begin):
        """Records that a trouble which may cause this error begins or ends."""
        with self.lock:
            self.active[error] += 1 if begin else -1
            self.changes[error] += 1

    def now(self):
        """Returns how often troubles have begun or ended, by error."""
        with self.lock:
            return dict(self.changes)

    def excuse(self, error, since):
        """Raises the error again unless a trouble that may cause it is active, or was active since then. since is from
        now()."""
        with self.lock:
            if not self.active.get(error.errno) and self.changes.get(error.errno) == since.get(error.errno):
                raise error

    # ---- readers ----

    def reader(self, rng):
        disk = Disk(self.device)
        while not self.stop.is_set():
            since = self.now()
            try:
                verify_random(disk, self.wanted, rng, 1)
                self.count("reads")
            except OSError as error:
                equal(error.errno, errno.EIO, "error of a read")
                self.excuse(error, since)
                self.count("failed reads")
        disk.close()

    # ---- troubles ----

    def faults_below(self, rng):
        kinds = [lambda lower: line(0, lower.sectors, "error"),
                 lambda lower: line(0, lower.sectors, "delay", lower.loop.path, 0, rng.choice((1, 30))),
                 lambda lower: line(0, lower.sectors, "flakey", lower.loop.path, 0, 0, 3600, 1, "error_reads")]
        while self.pause(rng):
            lower = rng.choice(self.lowers)
            self.trouble(errno.EIO, True)
            lower.swap(rng.choice(kinds)(lower))
            self.pause(rng)
            lower.swap(lower.good())
            self.trouble(errno.EIO, False)
            self.count("faults below")

    def failing_requests(self, rng):
        while self.pause(rng, 1):
            lower = rng.choice(self.lowers)
            self.trouble(errno.EIO, True)
            end = inject.requests(lower.device, probability=rng.choice((5, 50)))
            self.pause(rng)
            self.count("failing requests", end())
            self.trouble(errno.EIO, False)

    def no_memory(self, rng):
        while self.pause(rng, 1):
            self.trouble(errno.ENOMEM, True)
            end = inject.allocations(rng.choice((20, 100)))
            self.pause(rng, 1)
            self.count("failed allocations", end())
            self.trouble(errno.ENOMEM, False)

    def squeeze(self, rng):
        child = hog(96 << 10)
        try:
            self.stop.wait(SECONDS / 2)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
        self.count("memory hogs")

    def suspend(self, rng):
        while self.pause(rng):
            device = rng.choice([self.device] + [device for device, _, _ in self.zfiles])
            unless_late(device.suspend, bool(rng.randrange(2)))
            self.pause(rng, 0.05)
            unless_late(device.resume)
            self.count("suspends")

    def reload(self, rng):
        while self.pause(rng):
            device, table = rng.choice([(self.device, self.table)] + [zfile[:2] for zfile in self.zfiles])
            since = self.now()
            try:
                device.load(table)
                unless_late(device.resume)
                self.count("reloads")
            except OSError as error:
                self.excuse(error, since)
                self.count("failed reloads")

    def neighbours(self, rng):
        while self.pause(rng):
            other = dm.Device()
            _, table, raw = rng.choice(self.zfiles or [(self.device, self.table, self.wanted)])
            since = self.now()
            disk = None
            try:
                other.load(table)
                other.resume()
                disk = Disk(other)
                same_bytes(disk.read(0, 512), raw[:512], "first sector of a neighbour")
                self.count("neighbours")
            except OSError as error:
                self.excuse(error, since)
                self.count("neighbours that fail")
            finally:
                if disk:
                    disk.close()
                other.remove()

    def questions(self, rng):
        while self.pause(rng, 0.05):
            self.device.status(rng.choice((0, dm.TABLE, dm.IMA)))
            for device, _, _ in self.zfiles:
                device.status()
            try:
                self.device.message("anything")
            except OSError:
                self.count("questions")

    def forget(self, rng):
        while self.pause(rng, 0.5):
            kernel_memory()
            self.count("dropped caches")

    def run(self):
        troubles = [self.faults_below, self.suspend, self.reload, self.neighbours, self.questions, self.forget,
                    self.squeeze]
        if inject.possible():
            troubles += [self.failing_requests, self.no_memory]
        chosen = self.rng.sample(troubles, self.rng.randrange(1, len(troubles)))
        errors = []

        def guard(actor, seed):
            try:
                actor(random.Random(seed))
            except Exception as error:  # pylint: disable=broad-except
                errors.append((actor.__name__, error))
                self.stop.set()

        actors = [threading.Thread(target=guard, args=(actor, self.rng.random()), name=actor.__name__, daemon=True)
                  for actor in chosen + [self.reader] * 3]
        for actor in actors:
            actor.start()
        self.stop.wait(SECONDS)
        self.stop.set()
        end = time.monotonic() + BOUND
        for actor in actors:
            actor.join(max(end - time.monotonic(), 0))
        stuck = [actor.name for actor in actors if actor.is_alive()]
        if stuck:
            for command in ("info", "table", "status"):
                note(subprocess.run(["dmsetup", command], capture_output=True, text=True, check=False).stdout)
            raise Failure(f"threads still run after {BOUND} s: {stuck}; {errors}")
        note(describe(self.counts))
        check(not errors, f"{errors}")
        check(self.counts.get("reads", 0) > 0, "nothing was read")


def episode(seed, totals):
    """Runs one episode. Checks that the content is correct when all faults are gone."""
    rng = random.Random(seed)
    scene = Scene(rng)
    note(f"seed {seed}: {scene.size >> 10} KiB in {len(scene.lowers)} layers, {len(scene.zfiles)} of them ZFiles")
    scene.run()
    verify(scene.device, scene.wanted, rounds=20)
    totals.update(scene.counts)


def soak():
    """Runs episodes until the time is over, and checks the memory afterwards."""
    need_module("dm-flakey", "dm-delay")
    seeds = random.Random()
    before = None
    totals = collections.Counter()
    end = time.monotonic() + MINUTES * 60
    count = 0
    while time.monotonic() < end:
        alone(episode, os.environ.get("OBD_SOAK_SEED") or str(seeds.randrange(1 << 32)), totals)
        count += 1
        if before is None:
            before = kernel_memory()
    grown = kernel_memory() - before
    note(f"{count} episodes in {MINUTES:g} minutes, {grown} KiB more kernel memory than after the first")
    note(f"in all: {describe(totals)}")
    if count > 50:
        for what in ("failed reads", "suspends", "reloads", "neighbours", "memory hogs"):
            check(totals[what], f"no {what}")
        check(totals["failed allocations"] or not inject.possible(), "no allocation has failed")
    if grown > (32 << 10) * SLOW:
        raise Failure(f"{grown} KiB are not freed")


add(f"a random mix of everything for {MINUTES:g} minutes", soak, timeout=int(MINUTES * 60) + 300)

if __name__ == "__main__":
    main()
