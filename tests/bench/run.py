#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Runs the benchmark in the guest: run.py DIRECTORY RESULT [short | count] [PART...]. DIRECTORY has the images. With
short, does less, for an emulated CPU. With count, also leaves out what needs two CPUs or real time: the guest's clock
counts instructions then, one for each nanosecond."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

# pylint: disable=wrong-import-position
import load
import shared_layers
from by_function import profile
from obdtest import dm, image
from obdtest.dm import line
from obdtest.memory import kernel_memory

KIB, MIB = 1 << 10, 1 << 20
ZFILES = ("lz4-4k", "lz4-4k-crc", "lz4-64k", "zstd-4k", "zstd-64k")
EROFS = ("lz4-4k", "lz4-64k", "zstd-4k", "zstd-64k")
SQUASHFS = ("lz4-4k", "lz4-128k", "zstd-128k")

# The directories with programs, including those that cargo has installed (rublk).
RUBLK_PATH = f"{os.environ['PATH']}:/cargo/bin"

# What is measured: everything; a part; or a part, on one CPU.
FULL, SHORT, COUNT = "full", "short", "count"

# Reads of block devices: their title, the order of the places, the bytes, the number in flight, the threads.
ROWS = (("4k random, 1 deep", "random", 4 * KIB, 1, 1), ("4k random, 32 deep", "random", 4 * KIB, 32, 1),
        ("4k random, 2 x 16 deep", "random", 4 * KIB, 16, 2), ("64k random, 1 deep", "random", 64 * KIB, 1, 1),
        ("4k sequential", "run", 4 * KIB, 1, 1),
        ("128k sequential", "run", 128 * KIB, 1, 1), ("128k sequential, 8 deep", "run", 128 * KIB, 8, 1),
        ("128k sequential, 2 readers", "run", 128 * KIB, 1, 2),
        ("1m sequential", "run", MIB, 1, 1), ("1m sequential, 2 readers", "run", MIB, 1, 2))
COUNTED_ROWS = ("4k random, 1 deep", "4k random, 32 deep", "128k sequential", "1m sequential")
# The rows whose instructions are counted by function with PROFILE=y, for each device.
PROFILED = {"zfile lz4-4k": ("4k random, 1 deep", "128k sequential", "1m sequential"),
            "lsmt-zfile lz4-4k": ("4k random, 1 deep",), "zfile lz4-64k": ("4k random, 1 deep",),
            "lower lz4-4k": ("4k random, 1 deep", "128k sequential", "1m sequential"),
            "codec lz4-4k": ("4k random, 1 deep", "128k sequential", "1m sequential")}

# Things that are compared are measured in turn, this many times, for about this many nanoseconds each time.
TURNS, TURN_NS = 15, 50_000_000


class Ram:
    """RAM disks, one for each file."""

    def __init__(self):
        self.used = 0

    def fill(self, path):
        """Returns a RAM disk with the content of a file."""
        with open(path, "rb") as source:
            return self._fill(iter(lambda: source.read(MIB), b""))

    def fill_with(self, content):
        """Returns a RAM disk with these bytes."""
        return self._fill(content[at:at + MIB] for at in range(0, len(content), MIB))

    def _fill(self, pieces):
        device = f"/dev/ram{self.used}"
        self.used += 1
        size = 0
        with open(device, "rb+", buffering=0) as disk:
            for piece in pieces:
                dm.write(disk.fileno(), piece, size)
                size += len(piece)
            os.fsync(disk.fileno())
            # Drop the disk's page cache, a second copy of the data.
            fcntl.ioctl(disk, 0x1261)
        return Disk(device, size)


class Disk:
    """An existing block device."""

    def __init__(self, path, size):
        self.path, self.size = path, size


class Result:
    """Figures, by row and device."""

    def __init__(self, path):
        self.path = path
        self.data = {"kernel": os.uname().release, "cpus": os.cpu_count(), "rows": {}, "facts": {}}

    def add(self, row, device, figures):
        self.data["rows"].setdefault(row, {}).setdefault(device, []).append(figures)

    def fact(self, name, value):
        self.data["facts"][name] = value
        say(f"  {name}: {value}")

    def save(self):
        with open(self.path, "w", encoding="utf-8") as file:
            json.dump(self.data, file, indent=1)


def virtual_size(path):
    """Returns the virtual size of an LSMT layer in bytes."""
    with open(path, "rb") as file:
        file.seek(-4096 + 48, os.SEEK_END)
        return int.from_bytes(file.read(8), "little")


def say(text):
    print(text, flush=True)


def plan_of(places, length, on_disk=False):
    """Returns a plan of reads of places in the file, or on the disk."""
    return load.Plan((place[on_disk], length, 0) for place in places)


def output(*words):
    """Returns the first line that a program prints."""
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n", maxsplit=1)[0]


class Bench:
    """The devices, and the measurements on them."""

    def __init__(self, images, result, mode):
        self.images, self.result = images, result
        short = mode != FULL
        # An emulated CPU is ten times slower.
        self.less = 16 if short else 1
        self.rounds = 3 if short else 5
        self.turns = 3 if short else TURNS
        self.short, self.count = short, mode == COUNT
        profiles = f"{images}/profile"
        self.profiles = profiles if self.count and os.path.isdir(profiles) else None
        self.ram = Ram()
        self.kinds = ("lz4-4k", "zstd-64k") if mode == SHORT else ZFILES
        self.layer = load.Layer(f"{images}/raw.lsmt", {kind: f"{images}/{kind}.obd" for kind in self.kinds})
        say("filling RAM disks")
        self.raw = self.ram.fill(f"{images}/raw.lsmt")
        self.blobs = {kind: self.ram.fill(f"{images}/{kind}.obd") for kind in self.kinds}
        self.virtual_size = virtual_size(f"{images}/raw.lsmt")
        self.sizes = {blob.path: self.layer.zfiles[kind].size for kind, blob in self.blobs.items()}
        self.devices = {"raw": self.raw, "linear": self.linear(self.raw), "lsmt-raw": self.lsmt(self.raw)}
        self.lower = {}
        for kind, blob in self.blobs.items():
            self.devices[f"zfile {kind}"] = self.zfile(kind)
            self.devices[f"lsmt-zfile {kind}"] = self.lsmt(self.devices[f"zfile {kind}"])
            self.lower[kind] = self.linear(blob)

    @staticmethod
    def linear(disk):
        return dm.create(line(0, dm.sectors(disk.size), "linear", disk.path, 0))

    def zfile(self, kind, *options):
        blob, size = self.blobs[kind], self.layer.zfiles[kind].size
        device = dm.create(line(0, dm.sectors(size), "zfile", blob.path, blob.size, *options))
        device.size = size
        return device

    def lsmt(self, *layers, size=None):
        args = [arg for layer in layers for arg in (layer.path, layer.size)]
        return dm.create(line(0, (size or self.virtual_size) // 512, "lsmt", len(layers), *args))

    def erofs(self, kind):
        """Returns an erofs image without its own compression, on a zfile device."""
        path = f"{self.images}/erofs-{kind}.obd"
        blob, size = self.ram.fill(path), load.Zfile(path).size
        zfile = dm.create(line(0, dm.sectors(size), "zfile", blob.path, blob.size))
        zfile.size = size
        return self.lsmt(zfile, size=virtual_size(f"{self.images}/erofs.lsmt"))

    def repeat(self, title, jobs):
        """Runs jobs. A job is a function that returns figures, by (row, device). The jobs of similar rows (those with
        the same words before the comma) take turns, those of the same device next to each other. So a ratio of two of
        them is that of turns soon after one another: other work of the host affects both, or the ratio is an outlier.
        Every other round goes backwards, so that no job is always the later one."""
        say(title)
        start = time.monotonic()
        groups = {}
        for (row, device), job in jobs.items():
            groups.setdefault(row.split(",")[0], {}).setdefault(device, []).append((row, job))
        for devices in groups.values():
            turns = [(row, device, job) for device, rows in devices.items() for row, job in rows]
            for nth in range(self.turns):
                for row, device, job in turns[::-1 if nth % 2 else 1]:
                    if nth == 1 and self.profiles and row in PROFILED.get(device, ()):
                        self.result.add(row, device, profile(self.profiles, f"{device}, {row}", job))
                    else:
                        self.result.add(row, device, job())
        say(f"  {len(jobs)} figures, {time.monotonic() - start:.0f} s")
        self.result.save()

    # ---- block devices ----

    def block(self):
        """Measures reads of block devices, and the lower reads and decompression that limit them."""
        jobs = {}
        for title, length, depth, threads, places, fewer in self.rows():
            def read(device, plan, depth=depth, threads=threads):
                return lambda: load.bios(device.path, plan, depth, threads)

            part = self.turn(read, self.devices["linear"], places, length)
            for name in ("raw", "linear", "lsmt-raw"):
                jobs[title, name] = read(self.devices[name], plan_of(part, length, on_disk=name == "lsmt-raw"))
            for kind in self.kinds:
                # What is compared is next to each other.
                zfile, device = self.layer.zfiles[kind], self.devices[f"zfile {kind}"]
                part = self.turn(read, device, fewer if zfile.block > length else places, length)
                if self.count and zfile.block > length:
                    # One place in each block, so that the cache makes no difference.
                    part = list({file // zfile.block: (file, disk) for file, disk in part}.values())
                stored = load.Plan(zfile.stored(part, length))
                jobs[title, f"lower {kind}"] = read(self.lower[kind], load.Plan(zfile.lower(part, length)))
                # Decompression runs on one CPU: the order of reads and their number in flight make no difference.
                jobs[title, f"codec {kind}"] = self.codec_job(kind, stored, len(part))
                plan, on_disk = plan_of(part, length), plan_of(part, length, on_disk=True)
                jobs[title, f"zfile {kind}"] = read(device, plan)
                jobs[title, f"lsmt-zfile {kind}"] = read(self.devices[f"lsmt-zfile {kind}"], on_disk)
                if self.count and zfile.block > 4 * KIB:
                    jobs[title, f"zfile {kind}"] = self.cold(kind, read, plan)
                    jobs[title, f"lsmt-zfile {kind}"] = self.cold(kind, read, on_disk, lsmt=True)
        self.repeat("block devices", jobs)

    def cold(self, kind, read, plan, lsmt=False):
        """Returns a job that reads from a new zfile device, or from an lsmt device on it, so that its cache has nothing
        of the turn before."""
        def job():
            zfile = self.zfile(kind)
            device = self.lsmt(zfile) if lsmt else zfile
            figures = read(device, plan)()
            device.remove()
            if lsmt:
                zfile.remove()
            return figures
        return job

    def turn(self, read, device, places, length):
        """Returns as many of the places as can be read from the device in a turn. Where instructions are emulated, or
        counted, their number is fixed."""
        if self.short:
            return places
        some = places[:max(len(places) // 16, 16)]
        took = read(device, plan_of(some, length))()["ns"]
        return places[:max(len(some) * TURN_NS // max(took, 1), 16)]

    def rows(self):
        """Yields rows: their title, bytes, number in flight, threads, places, and fewer places for devices with larger
        blocks. There are enough for a turn on any device."""
        many, few, total = (1024, 128, 4 * MIB) if self.short else (49152, 4096, 256 * MIB)
        for title, how, length, depth, threads in ROWS:
            if self.count and title not in COUNTED_ROWS:
                continue
            if how == "random":
                places = self.layer.places(many if length == 4 * KIB else few, length, min(length, 64 * KIB))
                yield title, length, depth, threads, places, places[:len(places) // 8] if self.short else places
            else:
                places = self.layer.run(total, length)
                yield title, length, depth, threads, places, places

    def peers(self):
        """Measures reads of the same data through a loop device and, if rublk is there, through a process: one that
        does nothing, and one that reads."""
        peers = {"loop": Disk(output("losetup", "--find", "--show", "--read-only", "--direct-io=on", self.raw.path), 0)}
        if shutil.which("rublk", path=RUBLK_PATH):
            subprocess.run(["modprobe", "ublk_drv"], check=True)
            for number, words in enumerate((("null",), ("loop", "--file", self.raw.path))):
                subprocess.run(["rublk", "add", *words, "--number", str(number), "--queue", "1"], check=True,
                               env={**os.environ, "PATH": RUBLK_PATH})
                peers[f"ublk {words[0]}"] = Disk(f"/dev/ublkb{number}", 0)
        else:
            say("  no rublk: no figures of ublk")
        jobs = {}
        for title, length, depth, threads, places, _ in self.rows():
            plan = plan_of(places, length)
            for name, device in peers.items():
                jobs[title, name] = lambda d=device, p=plan, n=depth, t=threads: load.bios(d.path, p, n, t)
        self.repeat("peers", jobs)

    def codec_job(self, kind, stored, requests):
        def job():
            figures = load.codec(self.blobs[kind].path, stored, kind.split("-", maxsplit=1)[0], kind.endswith("crc"))
            figures["requests"] = requests
            return figures
        return job

    # ---- file systems ----

    def file(self):
        """Measures reads of files."""
        with open(f"{self.images}/files", encoding="utf-8") as file:
            found = [row.split(" ", 1) for row in file.read().splitlines()]
        names = [(name[2:], int(size)) for size, name in found]
        kinds = [kind for kind in EROFS if kind in self.kinds]
        mounts = {}
        for kind in kinds:
            mounts[f"ext4 on lsmt on zfile {kind}"] = self.mount("ext4", self.devices[f"lsmt-zfile {kind}"].path)
            mounts[f"erofs {kind}"] = self.mount("erofs", self.ram.fill(f"{self.images}/{kind}.erofs").path)
        mounts["erofs zstd-64k-extents"] = self.mount("erofs", self.ram.fill(f"{self.images}/zstd-64k-extents.erofs").path)
        for kind in ("lz4-4k", "zstd-64k"):
            mounts[f"erofs on lsmt on zfile {kind}"] = self.mount("erofs", self.erofs(kind).path)
        for kind in ("lz4-128k",) if self.short else SQUASHFS:
            mounts[f"squashfs {kind}"] = self.mount("squashfs", self.ram.fill(f"{self.images}/{kind}.squashfs").path)
        mounts["ext4 on lsmt on raw"] = self.mount("ext4", self.devices["lsmt-raw"].path)

        large = sorted((one for one in names if one[1] >= MIB), key=lambda one: one[1])[-64 // min(self.less, 8):]
        small = [one for one in names if 0 < one[1] <= 64 * KIB][::self.less]
        sequential = load.Plan((0, size, nth) for nth, (_, size) in enumerate(large))
        each = load.Plan((0, size, nth) for nth, (_, size) in enumerate(small))
        rng = load.random.Random(3)
        spots = [rng.choices(range(len(large)), [size for _, size in large])[0] for _ in range(4096 // self.less)]
        random = load.Plan((rng.randrange(large[nth][1] // 4096) * 4096, 4096, nth) for nth in spots)
        jobs = {}
        for name, at in mounts.items():
            large_names = [f"{at}/{one}" for one, _ in large]
            small_names = [f"{at}/{one}" for one, _ in small]

            def read(names, plan, at_once=128 * KIB, cold=True, keep=False):
                def job():
                    if cold:
                        load.drop_caches()
                    else:
                        # Once more below, from the page cache.
                        load.files(names, plan, at_once, keep=keep)
                    return load.files(names, plan, at_once, keep=keep)
                return job

            jobs["small files, cold", name] = read(small_names, each)
            jobs["random 4k, cold", name] = read(large_names, random, 4 * KIB, keep=True)
            jobs["sequential, cold", name] = read(large_names, sequential)
            jobs["sequential, warm", name] = read(large_names, sequential, cold=False)
        self.repeat("file systems", jobs)
        for at in mounts.values():
            subprocess.run(["umount", at], check=True)

    @staticmethod
    def mount(kind, device):
        at = f"/tmp/{os.path.basename(device)}-{kind}"
        os.mkdir(at)
        options = "ro,noload" if kind == "ext4" else "ro"
        subprocess.run(["mount", "-t", kind, "-o", options, device, at], check=True)
        return at


    # ---- caches ----

    def cache(self):
        """Measures small reads of large blocks, and images that share layers."""
        hot = self.zfile("zstd-64k")
        off = self.zfile("zstd-64k", 2, "cache_blocks", 0)
        rng = load.random.Random(4)
        first = [block * 64 * KIB for block in rng.sample(range(64, hot.size // (64 * KIB)), 32)]
        small = load.Plan((rng.choice(first) + rng.randrange(16) * 4096, 4096, 0) for _ in range(16384 // self.less))
        fewer = load.Plan(small.ranges[:2048 // self.less])
        total = 64 * MIB // self.less
        runs = {f"{name} scan": load.Plan((file, length, 0) for file, _ in self.layer.run(total, length))
                for name, length in (("128k", 128 * KIB), ("1m", MIB))}
        jobs = {("hot 4k random, zstd-64k", "cache"): lambda: load.bios(hot.path, small),
                ("hot 4k random, zstd-64k", "no cache"): lambda: load.bios(off.path, fewer)}
        for name, plan in runs.items():
            jobs[f"cold {name}, zstd-64k", "cache"] = lambda plan=plan: load.bios(hot.path, plan)
            jobs[f"cold {name}, zstd-64k", "no cache"] = lambda plan=plan: load.bios(off.path, plan)
        self.repeat("cache of large blocks", jobs)

        top = [self.ram.fill(f"{self.images}/{name}.obd") for name in ("b", "c")]
        for name, blob in zip("bc", top):
            self.sizes[blob.path] = os.path.getsize(f"{self.images}/{name}.lsmt")
        for name, milliseconds, total in (("brd", 0, 128 * MIB), ("delay", 1, 32 * MIB)):
            total //= min(self.less, 4)
            for _ in range(self.rounds):
                self.share(name, milliseconds, total, top)
        self.result.save()

    def share(self, name, milliseconds, total, top):
        """Measures two images that share all layers but the top one, on RAM disks or on slow ones: the second image
        after the first, and alone; and two readers of one image at the same time."""
        length = 128 * KIB
        ranges = [(at, length, 0) for at in range(0, total, length)]
        plan, twice = load.Plan(ranges), load.Plan(ranges + ranges)
        row = f"shared layers, {name}"

        def layers(*options):
            out = []
            for blob in (self.blobs["lz4-4k"], *top):
                lower = self.delay(blob, milliseconds) if milliseconds else blob
                size = self.sizes[blob.path]
                device = dm.create(line(0, dm.sectors(size), "zfile", lower.path, blob.size, *options))
                device.lower, device.size = lower, size
                out.append(device)
            return out

        def remove(devices):
            for device in devices:
                device.remove()
            for lower in (getattr(device, "lower", None) for device in devices):
                if isinstance(lower, dm.Device):
                    lower.remove()

        zfiles = layers()
        three = self.lsmt(*zfiles)
        self.result.add(row, "A+B+C, cold, without cache_all", load.bios(three.path, plan))
        remove([three])
        remove(zfiles)
        zfiles = layers(1, "cache_all")
        two, three = self.lsmt(*zfiles[:2]), self.lsmt(*zfiles)
        self.result.add(row, "A+B, cold", load.bios(two.path, plan))
        before = [counters(zfile) for zfile in zfiles]
        self.result.add(row, "A+B+C after A+B", load.bios(three.path, plan))
        after = [counters(zfile) for zfile in zfiles]
        for nth, what in enumerate("AB"):
            self.result.fact(f"{row}: reads of {what} for the second image", after[nth][0] - before[nth][0])
            self.result.fact(f"{row}: blocks of {what} decompressed for it", after[nth][2] - before[nth][2])
        remove([two, three])
        remove(zfiles)
        zfiles = layers(1, "cache_all")
        three = self.lsmt(*zfiles)
        self.result.add(row, "A+B+C, cold", load.bios(three.path, plan))
        single = sum(counters(zfile)[0] for zfile in zfiles)
        remove([three])
        remove(zfiles)
        zfiles = layers(1, "cache_all")
        three = self.lsmt(*zfiles)
        self.result.add(row, "A+B+C, cold, two readers", load.bios(three.path, twice, threads=2))
        both = sum(counters(zfile)[0] for zfile in zfiles)
        self.result.fact(f"{row}: lower reads of two readers at once / of one", round(both / single, 3))
        remove([three])
        remove(zfiles)

    @staticmethod
    def delay(disk, milliseconds):
        return dm.create(line(0, dm.sectors(disk.size), "delay", disk.path, 0, milliseconds))

    # ---- latency ----

    def latency(self):
        """Measures one read at a time on a slow device: each costs one lower read."""
        slow = self.delay(self.blobs["lz4-4k"], 1)
        size = self.layer.zfiles["lz4-4k"].size
        zfile = dm.create(line(0, dm.sectors(size), "zfile", slow.path, self.blobs["lz4-4k"].size))
        places = self.layer.places(64, 4 * KIB, 4 * KIB, 9)
        plan = load.Plan((at, 4 * KIB, 0) for at, _ in places)
        below = load.Plan(self.layer.zfiles["lz4-4k"].lower(places, 4 * KIB))
        self.repeat("latency", {("4k random on dm-delay", "delay"): lambda: load.bios(slow.path, below),
                                ("4k random on dm-delay", "zfile"): lambda: load.bios(zfile.path, plan)})
        stored = load.Plan(self.layer.zfiles["lz4-4k"].stored(places, 4 * KIB))
        codec = load.codec(self.blobs["lz4-4k"].path, stored, "lz4")
        self.result.fact("codec, ns per 4k block", round(codec["ns"] / len(places)))
        many = self.layer.places(4096, 4 * KIB, 4 * KIB, 10)
        fresh = self.zfile("lz4-4k")
        load.bios(fresh.path, load.Plan((at, 4 * KIB, 0) for at, _ in many))
        needed = self.layer.zfiles["lz4-4k"].needed(many, 4 * KIB)
        self.result.fact("bytes read beyond those stored, per 4k request", (counters(fresh)[1] - needed) / len(many))

    # ---- fairness ----

    def fairness(self):
        """Measures small reads, one at a time, beside a thread of the same CPU that reads much: from the lower
        device, from the same device, from another one. Each turn beside that thread follows one without it. Reads of a RAM disk end
        where they are submitted; those of null_blk end in a timer's interrupt, as those of hardware do."""
        turn, rounds = 50, 6 if self.short else 20
        for lower in ("ram disk", "null_blk"):
            for kind in ("lz4-4k", "zstd-64k"):
                blobs = self.blobs
                if lower == "null_blk":
                    blobs = {one: null_blk(self.blobs[one]) for one in ("lz4-4k", "zstd-64k")}
                device = self.zfile_on(blobs, kind)
                plans = [self.anywhere(device, 16384 // self.less, seed) for seed in range(10, 10 + rounds)]
                scans = self.scans(blobs, device, kind)
                for pause in (200,) if self.short else (0, 200):
                    row = f"{kind} on {lower}, {pause} us"
                    say(f"fairness, {row}")
                    start = time.monotonic()
                    rows = self.result.data.setdefault("fairness", {}).setdefault(row, {})
                    for plan in plans:
                        for name, scan in scans.items():
                            alone = load.beside(device.path, plan, turn, pause)
                            rows.setdefault(name, []).append((alone, load.beside(device.path, plan, turn, pause, scan)))
                    say(f"  {len(scans)} figures, {time.monotonic() - start:.0f} s")
                    self.result.save()

    def scans(self, blobs, device, kind):
        """Returns what is read beside the small reads: (path, plan, depth) by name."""
        linear = self.linear(blobs[kind])
        linear.size = blobs[kind].size
        others = {"dm-linear": linear, "same": device}
        for other in ("lz4-4k", "zstd-64k"):
            others[f"other, {other}"] = self.zfile_on(blobs, other)
        scans = {}
        for name, other in others.items():
            plan = load.Plan((at, MIB, 0) for at in range(0, other.size - MIB + 1, MIB))
            for depth in (1, 8):
                scans[f"{name}, 1m, {depth} deep"] = other.path, plan, depth
        flood = others["other, lz4-4k"]
        scans["other, lz4-4k, 4k random, 256 deep"] = flood.path, self.anywhere(flood, 16384 // self.less, 7), 256
        return scans

    def zfile_on(self, blobs, kind):
        blob, size = blobs[kind], self.layer.zfiles[kind].size
        device = dm.create(line(0, dm.sectors(size), "zfile", blob.path, blob.size))
        device.size = size
        return device

    @staticmethod
    def anywhere(device, count, seed):
        """Returns a plan of random reads of 4 KiB."""
        rng = load.random.Random(seed)
        return load.Plan((rng.randrange(device.size // 4096) * 4096, 4096, 0) for _ in range(count))

    # ---- indexes ----

    def lookup(self):
        """Measures the lookup of a sector, by number of segments and layers."""
        data = 64 * MIB
        with open(f"{self.images}/raw.lsmt", "rb") as file:
            content = file.read(data)
        jobs = {}
        rng = load.random.Random(5)
        plain = self.linear(self.ram.fill_with(content))
        # A layer has at most a million segments, here in whole 4 KiB blocks.
        for layers, segments in ((1, 1000), (1, 10000), (1, 100000), (1, 999936), (16, 1000000), (255, 1000),
                                 (255, 100000), (255, 1000000)):
            made = Synthetic(layers, segments, content)
            disks = [self.ram.fill_with(blob) for blob in made.blobs()]
            args = [arg for disk in disks for arg in (disk.path, disk.size)]
            device = dm.Device()
            start = time.monotonic()
            device.load(line(0, made.sectors, "lsmt", layers, *args))
            took = time.monotonic() - start
            device.resume()
            name = f"{segments} segments, {layers} layers"
            self.result.fact(f"construction, {name}, ms", round(took * 1000, 1))
            self.result.fact(f"reading for it, {name}, ms", round(read_time(disks, segments // layers * 16) * 1000, 1))
            if segments == 1000000:
                self.result.fact("bytes of memory per segment", int(device.info()[3]) / int(device.info()[1]))
            picked = [(rng.randrange(segments), rng.randrange(made.length // 4096) * 4096) for _ in range(49152)]
            plan = load.Plan((made.where[nth] * 512 + at, 4096, 0) for nth, at in picked)
            # The same data through dm-linear.
            other = load.Plan((made.what[nth] + at, 4096, 0) for nth, at in picked)
            jobs["4k random, by segments", name] = lambda d=device, p=plan: load.bios(d.path, p)
            jobs["4k random, by segments", f"linear as {name}"] = lambda p=other: load.bios(plain.path, p)
            if layers > 1:
                # The same data from the same disks, to tell their cost from that of the lookup.
                each = made.size // 512
                lines = [line(nth * each, each, "linear", disk.path, 8) for nth, disk in enumerate(disks)]
                spread = dm.create(*lines)
                jobs["4k random, by segments", f"spread as {name}"] = lambda d=spread, p=other: load.bios(d.path, p)
        self.repeat("lookup", jobs)

    def cost(self):
        """Measures memory and set-up time of devices."""
        for gib in (1, 4, 16, 64):
            blob = self.ram.fill_with(hollow_zfile(gib << 30))
            blocks = (gib << 30) // 4096
            device = dm.Device()
            start = time.monotonic()
            device.load(line(0, (gib << 30) // 512, "zfile", blob.path, blob.size))
            took = time.monotonic() - start
            device.resume()
            self.result.fact(f"construction, zfile of {gib} GiB, ms", round(took * 1000, 1))
            self.result.fact(f"reading for it, zfile of {gib} GiB, ms", round(read_time([blob], blocks * 4) * 1000, 1))
            self.result.fact(f"bytes of memory per block, {gib} GiB", int(device.info()[4]) / blocks)
            device.remove()
        tiny = self.ram.fill_with(image.zfile(image.sample(65536)))
        for name, table in (("dm-linear", line(0, 8, "linear", tiny.path, 0)),
                            ("zfile", line(0, 128, "zfile", tiny.path, tiny.size))):
            before = kernel_memory()
            devices = [dm.create(table) for _ in range(2000)]
            grown = kernel_memory() - before
            self.result.fact(f"KiB per idle {name} device", round(grown / 2000, 1))
            self.result.fact(f"MiB for 2000 idle {name} devices", round(grown / 1024))
            for device in devices:
                device.remove()

    def sharing(self):
        """Measures the cost of images that share layers."""
        device = f"/dev/ram{self.ram.used}"
        self.ram.used += 1
        shared_layers.main(device, (2, 10) if self.short else (2, 10, 100), self.result.fact)

    def interrupts(self):
        """Tests the kernel: whether two CPUs get all interrupts, from each other and from timers."""
        seconds = int(os.environ.get("OBD_STORM_SECONDS", "10"))
        for name, value in load.storm(seconds * 1000).items():
            self.result.fact(f"interrupts, {seconds} s each, {name}", value)


def null_blk(disk):
    """Returns a null_blk device in memory with the content of a disk. Its reads end in a timer's interrupt after
    20 us."""
    config = "/sys/kernel/config/nullb"
    if not os.path.exists(config):
        subprocess.run(["mount", "-t", "configfs", "configfs", "/sys/kernel/config"], check=True)
    # The device in /dev has this name, too.
    name = f"null_{os.path.basename(disk.path)}"
    path = f"/dev/{name}"
    if not os.path.exists(f"{config}/{name}"):
        os.mkdir(f"{config}/{name}")
        for key, value in (("size", -(-disk.size // MIB)), ("blocksize", 512), ("memory_backed", 1), ("irqmode", 2),
                           ("completion_nsec", 20000), ("hw_queue_depth", 256), ("power", 1)):
            with open(f"{config}/{name}/{key}", "w", encoding="ascii") as file:
                file.write(str(value))
        subprocess.run(["dd", f"if={disk.path}", f"of={path}", "bs=1M", "iflag=count_bytes", f"count={disk.size}",
                        "status=none", "conv=fsync"], check=True)
    return Disk(path, disk.size)


def counters(zfile):
    """Returns the number of lower reads, their bytes, and the number of blocks decompressed, from a zfile device's
    status."""
    return [int(word) for word in zfile.info()[5:8]]


class Synthetic:
    """Layers whose segments, so many in all, take turns on the disk. Each layer has its share of the data; each
    segment has a part of it, at least 4 KiB."""

    def __init__(self, layers, segments, content):
        rng = load.random.Random(6)
        self.layers, self.content = layers, content
        self.size = len(content) // layers // 4096 * 4096
        self.length = max(len(content) // segments // 4096, 1) * 4096
        # The place of each segment on the disk in sectors, and of its data in content in bytes.
        self.where, self.what = [], []
        at = 0
        for nth in range(segments):
            at += rng.randrange(5) * 8
            self.where.append(at)
            at += self.length // 512
            place = rng.randrange((self.size - self.length) // 4096 + 1) * 4096
            self.what.append(nth % layers * self.size + place)
        self.sectors = at

    def blobs(self):
        for layer in range(self.layers):
            data = self.content[layer * self.size:(layer + 1) * self.size]
            entries = b"".join(image.lsmt_entry(where, self.length // 512, 8 + what % self.size // 512)
                               for where, what in zip(self.where[layer::self.layers], self.what[layer::self.layers]))
            entries += image.INVALID * (-len(entries) // 16 % 256)
            yield b"".join((image.lsmt_struct(7, self.sectors * 512), data, entries,
                            image.lsmt_struct(6, self.sectors * 512, 4096 + len(data), len(entries) // 16)))


def hollow_zfile(size):
    """Returns a ZFile with an index for so many bytes. Each block is one byte, and not valid data."""
    count = size // 4096
    options = {"block": 4096, "algorithm": image.LZ4, "verify": 0, "digest": False}
    filled = {"index_offset": 512 + count, "count": count, "size": size, "index_crc": 0, **options}
    return b"".join((image.zfile_struct(0xB, **filled), bytes(count), b"\1\0\0\0" * count,
                     image.zfile_struct(0x6, **filled)))


def read_time(disks, index_bytes):
    """Returns the seconds that it takes to read so many bytes at the end of each disk."""
    total = 0
    for disk in disks:
        start = max(disk.size - index_bytes, 0) // 4096 * 4096
        plan = load.Plan((at, min(128 * KIB, disk.size // 512 * 512 - at), 0)
                         for at in range(start, disk.size // 512 * 512, 128 * KIB))
        total += load.bios(disk.path, plan, 4)["ns"] / 1e9
    return total


PARTS = {FULL: ("block", "file", "cache", "latency", "fairness", "lookup", "cost", "sharing"),
         SHORT: ("block", "file"), COUNT: ("block", "peers")}


def main():
    images, path, *words = sys.argv[1:]
    mode = next((word for word in words if word in (SHORT, COUNT)), FULL)
    bench = Bench(images, Result(path), mode)
    for part in [word for word in words if word != mode] or PARTS[mode]:
        getattr(bench, part)()
    bench.result.save()


if __name__ == "__main__":
    main()
