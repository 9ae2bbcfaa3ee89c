#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A random mix of everything, for OBD_SOAK_MINUTES (1): episodes of some seconds, each with a stack of its
own, readers who verify, and a choice of troubles: faults below, no memory, reloads, neighbours.

A read may fail only while a fault is on or was on since it began. An episode is told by its seed:
OBD_SOAK_SEED runs one again, as far as chance in time allows.
"""

import errno
import os
import random
import subprocess
import threading
import time

from obdtest import dm, image, inject
from obdtest.disk import Disk, same_bytes, verify, verify_random
from obdtest.dm import line
from obdtest.ktap import Failure, Skip, add, alone, check, main, note
from obdtest.memory import hog, kernel_memory

MINUTES = float(os.environ.get("OBD_SOAK_MINUTES", "1"))
SECONDS = 12


class Lower:
    """A blob on a linear device, whose table can be changed under its users."""

    def __init__(self, raw):
        self.loop = dm.Loop(raw)
        self.raw, self.sectors = raw, self.loop.size // 512
        self.device = dm.create(self.good())

    def good(self):
        return line(0, self.sectors, "linear", self.loop.path, 0)

    def swap(self, table):
        self.device.load(table)
        self.device.resume()


class Scene:
    """A stack of random layers, and what it must read as."""

    def __init__(self, rng):
        self.rng, self.stop = rng, threading.Event()
        self.faults, self.lock = 0, threading.Lock()
        self.active = 0
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
                table = line(0, dm.sectors(len(raw)), "zfile", lower.device.path, len(lower.raw), 2, "cache_blocks",
                             rng.choice((0, 8, 64)))
                device = dm.create(table)
                self.zfiles.append((device, table, raw))
            else:
                lower = Lower(raw)
                device = lower.device
            self.lowers.append(lower)
            layers += [device.path, len(raw)]
        self.table = line(0, self.size // 512, "lsmt", len(raws), *layers)
        self.device = dm.create(self.table)

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def pause(self, most=0.3):
        """Waits a little; tells whether to go on."""
        return not self.stop.wait(self.rng.random() * most)

    def fault(self, begin):
        """A fault begins or ends."""
        with self.lock:
            self.active += 1 if begin else -1
            self.faults += 1

    def may_fail(self, since):
        with self.lock:
            return self.active > 0 or self.faults != since

    # ---- who reads ----

    def reader(self):
        disk = Disk(self.device)
        rng = random.Random(self.rng.random())
        while not self.stop.is_set():
            since = self.faults
            try:
                verify_random(disk, self.wanted, rng, 1)
                self.count("reads")
            except OSError as error:
                if error.errno != errno.EIO or not self.may_fail(since):
                    raise
                self.count("failed reads")
        disk.close()

    # ---- troubles ----

    def faults_below(self):
        kinds = [lambda lower: line(0, lower.sectors, "error"),
                 lambda lower: line(0, lower.sectors, "delay", lower.loop.path, 0, self.rng.choice((1, 30))),
                 lambda lower: line(0, lower.sectors, "flakey", lower.loop.path, 0, 0, 3600, 1, "error_reads")]
        while self.pause():
            lower = self.rng.choice(self.lowers)
            self.fault(True)
            lower.swap(self.rng.choice(kinds)(lower))
            self.pause()
            lower.swap(lower.good())
            self.fault(False)
            self.count("faults below")

    def failing_requests(self):
        while self.pause(1):
            def once():
                lower = self.rng.choice(self.lowers)
                self.fault(True)
                end = inject.requests(lower.device, probability=self.rng.choice((5, 50)))
                self.pause()
                end()
                self.fault(False)
            once()
            self.count("failing requests")

    def no_memory(self):
        while self.pause(1):
            end = inject.allocations(self.rng.choice((20, 100)))
            self.pause(1)
            end()
            self.count("allocations that fail")

    def squeeze(self):
        child = hog(96 << 10)
        try:
            self.stop.wait(SECONDS / 2)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
        self.count("memory hogs")

    def suspend(self):
        while self.pause():
            device = self.rng.choice([self.device] + [device for device, _, _ in self.zfiles])
            device.suspend(noflush=bool(self.rng.randrange(2)))
            self.pause(0.05)
            device.resume()
            self.count("suspends")

    def reload(self):
        while self.pause():
            device, table = self.rng.choice([(self.device, self.table)] + [zfile[:2] for zfile in self.zfiles])
            try:
                device.load(table)
                device.resume()
                self.count("reloads")
            except OSError as error:
                # A fault while metadata is read, or no memory for it.
                if error.errno not in (errno.EIO, errno.ENOMEM):
                    raise
                self.count("failed reloads")

    def neighbours(self):
        while self.pause():
            other = dm.Device()
            try:
                device, table, raw = self.rng.choice(self.zfiles or [(self.device, self.table, self.wanted)])
                since = self.faults
                other.load(table)
                other.resume()
                disk = Disk(other)
                try:
                    same_bytes(disk.read(0, 512), raw[:512], "first sector of a neighbour")
                except OSError as error:
                    if error.errno != errno.EIO or not self.may_fail(since):
                        raise
                finally:
                    disk.close()
                self.count("neighbours")
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ENOMEM):
                    raise
            finally:
                other.remove()

    def questions(self):
        while self.pause(0.05):
            self.device.status(self.rng.choice((0, dm.TABLE, dm.IMA)))
            for device, _, _ in self.zfiles:
                device.status()
            try:
                self.device.message("anything")
            except OSError:
                self.count("questions")

    def forget(self):
        while self.pause(0.5):
            kernel_memory()
            self.count("dropped caches")

    def run(self):
        troubles = [self.faults_below, self.suspend, self.reload, self.neighbours, self.questions, self.forget,
                    self.squeeze]
        if inject.possible():
            troubles += [self.failing_requests, self.no_memory]
        chosen = self.rng.sample(troubles, self.rng.randrange(1, len(troubles)))
        errors = []

        def guard(actor):
            try:
                actor()
            except Exception as error:  # pylint: disable=broad-except
                errors.append((actor.__name__, error))
                self.stop.set()

        actors = [threading.Thread(target=guard, args=(actor,)) for actor in chosen + [self.reader] * 3]
        for actor in actors:
            actor.start()
        self.stop.wait(SECONDS)
        self.stop.set()
        for actor in actors:
            actor.join()
        note(", ".join(f"{what}: {number}" for what, number in sorted(self.counts.items())))
        check(not errors, f"{errors}")
        check(self.counts.get("reads", 0) > 0, "nothing was read")


def episode(seed):
    """One of them; everything is mended and right at its end."""
    rng = random.Random(seed)
    scene = Scene(rng)
    note(f"seed {seed}: {scene.size >> 10} KiB in {len(scene.lowers)} layers, {len(scene.zfiles)} of them ZFiles")
    scene.run()
    verify(scene.device, scene.wanted, rounds=20)


def soak():
    """Episodes until time is over, and what memory they have left."""
    for module in ("dm-flakey", "dm-delay"):
        if subprocess.run(["modprobe", module], capture_output=True, check=False).returncode:
            raise Skip(f"no kernel module {module}")
    seeds = random.Random()
    before = None
    end = time.monotonic() + MINUTES * 60
    count = 0
    while time.monotonic() < end:
        alone(episode, os.environ.get("OBD_SOAK_SEED") or str(seeds.randrange(1 << 32)))
        count += 1
        if before is None:
            before = kernel_memory()
    grown = kernel_memory() - before
    note(f"{count} episodes in {MINUTES:g} minutes, {grown} KiB more kernel memory than after the first")
    if grown > 32 << 10:
        raise Failure(f"{grown} KiB are not free again")


add(f"a random mix of everything for {MINUTES:g} minutes", soak, timeout=int(MINUTES * 60) + 300)

if __name__ == "__main__":
    main()
