#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Races: every operation on devices, concurrently and with readers, many times. Afterwards the kernel's memory is as
it was before."""

import ctypes
import errno
import mmap
import os
import random
import signal
import subprocess
import threading
import time
import traceback

from obdtest import dm, image
from obdtest.disk import Disk, same_bytes, verify, verify_random
from obdtest.dm import line
from obdtest.ktap import SLOW, Failure, Skip, add, alone, check, defer, equal, main, note, test
from obdtest.memory import kernel_memory
from obdtest.module import MODULE, module_file, use_count

# The numbers below are divided by 5, on slow kernels by 10, unless OBD_FULL is set.
LESS = 1 if os.environ.get("OBD_FULL") else 5 * min(SLOW, 2)
CYCLES = 1000 // LESS
DEVICES = 2000 // LESS

DATA = image.sample(300000, 101)
PADDED = DATA + bytes(-len(DATA) % 512)
LENGTH = dm.sectors(len(DATA))
RAW = image.zfile(DATA)
VSIZE = 256 << 10
LAYER = image.lsmt(VSIZE, [(0, image.sample(200 * 512, 102)), (300, 20)])
PLAIN = image.flatten([image.Lsmt(LAYER)])


def together(*loops):
    """Runs functions in threads. One that ends or fails doesn't stop the others."""
    errors = []

    def run(loop):
        try:
            loop()
        except Exception as error:  # pylint: disable=broad-except
            errors.append((loop.__name__, "".join(traceback.format_exception(error))))

    threads = [threading.Thread(target=run, args=(loop,)) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(not errors, "\n".join(f"{name}: {error}" for name, error in errors[:2]))


def every_operation(device, tables, wanted):
    """Does each operation on a device CYCLES times, all concurrently, with readers and with other devices on the same
    lower device."""
    done = {}
    busy = [5]
    lock = threading.Lock()

    def cycles(name, function):
        def loop():
            try:
                for nth in range(CYCLES):
                    function(nth)
                    done[name] = done.get(name, 0) + 1
            finally:
                with lock:
                    busy[0] -= 1
        loop.__name__ = name
        return loop

    def allowed(function, *args, errors):
        try:
            function(*args)
        except OSError as error:
            equal(error.errno in errors, True, f"{function.__name__}: {error}")

    def create_remove(nth):
        other = dm.Device()
        other.load(tables[nth % len(tables)])
        if nth % 4:
            other.resume()
        if nth % 16 == 1:
            disk = Disk(other)
            same_bytes(disk.read(8192, 4096), wanted[8192:12288], "content of another device")
            disk.close()
        other.remove()

    def reload(nth):
        # A concurrent suspend and resume may have made the table live already.
        device.load(tables[nth % len(tables)])
        allowed(device.resume, errors={errno.EINVAL})

    def suspend_resume(nth):
        allowed(device.suspend, bool(nth % 2), errors={errno.EINVAL})
        allowed(device.resume, errors={errno.EINVAL})

    def message(nth):
        try:
            device.message("hello world")
        except OSError as error:
            check(error.errno in (errno.EINVAL, errno.EIO, errno.ENXIO), f"message: {error}")
        else:
            raise Failure("a message was accepted")

    def status(nth):
        rows = device.status((0, dm.TABLE, dm.IMA)[nth % 3], inactive=bool(nth & 1))
        check(len(rows) <= 1, f"status: {rows}")
        device.deps()

    reads = [0]

    def reader():
        disk = Disk(device)
        rng = random.Random(threading.get_ident())
        while busy[0]:
            verify_random(disk, wanted, rng, 4)
            reads[0] += 4
        disk.close()

    together(cycles("create and remove", create_remove), cycles("reload", reload),
             cycles("suspend and resume", suspend_resume), cycles("message", message), cycles("status", status),
             reader, reader)
    note(f"{reads[0]} reads meanwhile")
    equal(sorted(done.values()), [CYCLES] * 5, f"cycles of {sorted(done)}")
    check(reads[0] > 100, f"{reads[0]} reads")
    device.resume()
    verify(device, wanted, rounds=20)


def zfile_operations():
    loops = [dm.Loop(image.zfile(DATA, algorithm, block)) for algorithm in image.NAMES for block in (4096, 65536)]
    tables = [line(0, LENGTH, "zfile", loop.path, "-", *options) for loop in loops for options in ((), (1, "cache_all"))]
    every_operation(dm.create(tables[0]), tables, PADDED)


def lsmt_operations():
    packed = image.zfile(LAYER, image.ZSTD)
    lower = dm.zfile(dm.Loop(packed), len(packed), len(LAYER))
    plain = dm.Loop(LAYER)
    tables = [line(0, VSIZE // 512, "lsmt", 1, device.path, len(LAYER)) for device in (lower, plain)]
    every_operation(dm.create(tables[0]), tables, PLAIN)


def comes_back(function):
    """Runs a test, and checks that the kernel has freed the memory that it used for the test."""
    before = kernel_memory()
    alone(function)
    equal(use_count(), 0, "use count of the module")
    for _ in range(20):
        grown = kernel_memory() - before
        if grown < 8 << 10:
            break
        time.sleep(0.2)
    note(f"{grown} KiB more kernel memory than before")
    # Kernels with checkers free memory late, and find leaks themselves at the end of the run.
    check(grown < (24 << 10) * SLOW, f"{grown} KiB are not freed")


def many_devices():
    loop = dm.Loop(RAW)
    devices = [dm.Device() for _ in range(DEVICES)]
    failures = []

    def some(part):
        try:
            for device in part:
                device.load(line(0, LENGTH, "zfile", loop.path, len(RAW)))
                device.resume()
        except OSError as error:
            failures.append(error)

    def remove(part):
        try:
            for device in part:
                device.remove()
        except (Failure, OSError) as error:
            failures.append(error)

    before = kernel_memory()
    start = time.monotonic()
    together(*[lambda nth=nth: some(devices[nth::4]) for nth in range(4)])
    check(not failures, f"{failures[:1]}")
    equal(use_count(), DEVICES, "use count of the module")
    note(f"{DEVICES} devices after {time.monotonic() - start:.1f} s, {(kernel_memory() - before) // DEVICES} KiB each")
    rng = random.Random(1)
    for device in devices:
        offset = rng.randrange(len(DATA) // 4096) * 4096
        disk = Disk(device)
        same_bytes(disk.read(offset, 4096), DATA[offset:offset + 4096], f"{device.name}, 4096 at {offset}")
        disk.close()
    start = time.monotonic()
    together(*[lambda nth=nth: remove(devices[nth::4]) for nth in range(4)])
    check(not failures, f"{failures[:1]}")
    note(f"removed in {time.monotonic() - start:.1f} s")


def late(raw, milliseconds=100):
    """Returns a device with the blob, and a function. Once the function was called, the device delays each read."""
    loop = dm.Loop(raw)
    total = loop.size // 512
    lower = dm.create(line(0, total, "linear", loop.path, 0))

    def start():
        lower.load(line(0, total, "delay", loop.path, 0, milliseconds))
        lower.resume()

    return lower, start


@test("readers are killed with I/O in flight, and the device is removed immediately")
def killed():
    subprocess.run(["modprobe", "dm-delay"], check=False)
    for nth in range(12):
        def once(nth=nth):
            lower, start = late(RAW)
            device = dm.zfile(lower, len(RAW), len(DATA))
            start()
            child = os.fork()
            if not child:
                try:
                    threads = [threading.Thread(target=Disk(device).read, args=(at * 4096, 4096 * (1 + nth % 3)))
                               for at in range(16)]
                    for thread in threads:
                        thread.start()
                finally:
                    time.sleep(30)
                    os._exit(1)
            # A lower read takes 100 ms.
            for _ in range(500 * SLOW):
                if int(device.info()[5]) > 2:
                    break
                time.sleep(0.01)
            check(int(device.info()[5]) > 2, "no lower read was started")
            time.sleep(nth * 0.005)
            os.kill(child, signal.SIGKILL)
            if nth % 2:
                device.try_remove(deferred=True)
            os.waitpid(child, 0)
            for _ in range(100):
                if not device.exists():
                    break
                device.removed = False
                device.remove()
            check(not device.exists(), "the device is still there")
            lower.remove()
        alone(once)


@test("a process that creates a device is killed while the index is read")
def maker_killed():
    subprocess.run(["modprobe", "dm-delay"], check=False)
    # 16 MB in four reads of 128 KiB at a time take more than nine seconds.
    raw = image.lsmt_of([image.lsmt_entry(0, 8, 8)] + [image.INVALID] * 999000, image.sample(4096), 4096)
    lower, start = late(raw, 300)
    start()
    device = dm.Device()
    child = os.fork()
    if not child:
        try:
            device.load(line(0, 8, "lsmt", 1, lower.path, len(raw)))
        finally:
            os._exit(0)
    time.sleep(2)
    check(use_count() > 0, "the device is not being made")
    os.kill(child, signal.SIGKILL)
    killed_at = time.monotonic()
    _, status = os.waitpid(child, 0)
    equal(os.WTERMSIG(status), signal.SIGKILL, "signal that ended the process")
    took = time.monotonic() - killed_at
    note(f"{took:.1f} s")
    check(took < 6, f"the process took {took:.1f} s to end")
    equal(use_count(), 0, "use count of the module")
    equal(device.status(inactive=True), [], "a loaded table")


@test("a table with I/O in flight is replaced")
def replaced():
    subprocess.run(["modprobe", "dm-delay"], check=False)
    lower, start = late(RAW)
    device = dm.zfile(lower, len(RAW), len(DATA))
    start()
    results = []

    def read(at):
        disk = Disk(device)
        try:
            results.append(disk.read(at, 8192) == DATA[at:at + 8192])
        except OSError as error:
            results.append(errno.errorcode[error.errno])
        disk.close()

    for nth in range(6):
        threads = [threading.Thread(target=read, args=(at * 8192,)) for at in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.03)
        device.load(line(0, LENGTH, "error") if nth % 2 == 0 else line(0, LENGTH, "zfile", lower.path, len(RAW)))
        device.suspend(noflush=bool(nth & 2))
        device.resume()
        for thread in threads:
            thread.join()
    equal(len(results), 48, "reads that ended")
    check(True in results, f"{results}")
    check(set(results) <= {True, "EIO"}, f"{set(results)}")


@test("a CPU goes offline and online while it runs workers")
def cpu_goes():
    switch = "/sys/devices/system/cpu/cpu1/online"
    if not os.path.exists(switch):
        raise Skip("no second CPU that can be switched off")

    def turn(state):
        with open(switch, "w", encoding="ascii") as file:
            file.write(state)

    defer(turn, "1")
    large = image.sample(2 << 20, 103)
    raw = image.zfile(large, image.ZSTD, 16384)
    device = dm.zfile(dm.Loop(raw), len(raw), len(large))
    over, reads = threading.Event(), [0]

    def reader(seed):
        disk, rng = Disk(device), random.Random(seed)
        while not over.is_set():
            # Reads of 1 MiB need several workers.
            at = rng.randrange(2048) * 512
            same_bytes(disk.read(at, 1 << 20), large[at:at + (1 << 20)], f"at {at}")
            reads[0] += 1
        disk.close()

    def switcher():
        try:
            for _ in range(10):
                for state in ("0", "1"):
                    before, end = reads[0], time.monotonic() + 30 * SLOW
                    turn(state)
                    while reads[0] < before + 5 and time.monotonic() < end:
                        time.sleep(0.01)
                    check(reads[0] >= before + 5, f"no reads once CPU 1 is {'online' if state == '1' else 'offline'}")
        finally:
            over.set()

    together(switcher, *[lambda seed=seed: reader(seed) for seed in range(3)])
    note(f"{reads[0]} reads")


class Memory:
    """Memory that is mapped twice. Disks are read into one mapping, which is removed and restored meanwhile; another
    thread writes to the other mapping."""

    SIZE = 1 << 20

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                                   ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.libc.pread.restype = ctypes.c_ssize_t
        self.libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
        self.fd = os.memfd_create("obdtest-scribble")
        defer(os.close, self.fd)
        os.truncate(self.fd, self.SIZE)
        self.view = mmap.mmap(self.fd, self.SIZE)
        self.address = self.libc.mmap(None, self.SIZE, 3, mmap.MAP_SHARED, self.fd, 0)
        check(self.address != ctypes.c_void_p(-1).value, "mmap")
        defer(self.libc.munmap, self.address, self.SIZE)

    def read(self, disk, at, length, offset):
        """Reads into the mapping that unmap() removes and restores. Returns the number of bytes, or the negative
        errno."""
        got = self.libc.pread(disk.direct, self.address + at, length, offset)
        return got if got >= 0 else -ctypes.get_errno()

    def unmap(self):
        """Removes the mapping and restores it, between reads and during reads."""
        # Always keep a mapping at this address, so that no other memory is mapped there.
        fixed = 0x10
        for access, how, fd in ((0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1), (3, mmap.MAP_SHARED, self.fd)):
            got = self.libc.mmap(self.address, self.SIZE, access, how | fixed, fd, 0)
            check(got == self.address, "mmap")


def scribbled(raw, cache):
    """The buffers of some readers change and are unmapped during the reads. Other readers still get the correct
    data."""
    options = cache.split()
    device = dm.create(line(0, LENGTH, "zfile", dm.Loop(raw).path, len(raw), len(options), *options))
    memory = Memory()
    start = time.monotonic()
    outcome = {"read": 0, "fault": 0}

    def over():
        # On a slow machine, go on until there were enough reads and faults.
        spent = time.monotonic() - start
        return spent > 4 and (outcome["read"] > 20 and outcome["fault"] > 0 or spent > 100)

    def scribbler():
        rng = random.Random(7)
        while not over():
            at = rng.randrange(Memory.SIZE - 70000)
            memory.view[at:at + 65536] = rng.randbytes(65536)

    def unmapper():
        while not over():
            memory.unmap()
            time.sleep(0.002)

    def read_into(half):
        # Each reader has a half of the memory. If both read into the same bytes, the kernel writes these twice at the
        # same time, and KCSAN reports this race, which is that of the program.
        disk = Disk(device)
        rng = random.Random(half)
        while not over():
            length = rng.choice((512, 4096, 65536, 131072))
            offset = rng.randrange((len(PADDED) - length) // 512) * 512
            got = memory.read(disk, half * Memory.SIZE // 2 + rng.randrange(7) * 65536, length, offset)
            check(got == length or got == -errno.EFAULT or 0 <= got < length, f"read: {got}")
            outcome["read" if got == length else "fault"] += 1
        disk.close()

    def victim():
        read_into(0)

    def other_victim():
        read_into(1)

    def honest():
        disk = Disk(device)
        rng = random.Random(9)
        while not over():
            verify_random(disk, PADDED, rng, 4)
        disk.close()

    together(scribbler, unmapper, victim, other_victim, honest)
    note(f"{outcome}")
    check(outcome["read"] > 20 and outcome["fault"] > 0, f"{outcome}")
    info = device.info()
    equal((info[0], info[9]), ("V", "0"), "state and corrupt blocks")
    verify(device, PADDED, rounds=20)


@test("the module is unloaded and loaded while devices are created", timeout=400)
def unload_race():
    path = module_file()
    loop = dm.Loop(RAW)
    stop = threading.Event()
    outcome = {"made": 0, "refused": 0, "unloaded": 0}
    defer(lambda: os.path.exists(MODULE) or subprocess.run(["insmod", path], check=True))

    def maker():
        while not stop.is_set():
            device = dm.Device()
            try:
                device.load(line(0, LENGTH, "zfile", loop.path, len(RAW)))
                device.resume()
                disk = Disk(device)
                same_bytes(disk.read(4096, 4096), DATA[4096:8192], "content")
                disk.close()
                outcome["made"] += 1
            except OSError as error:
                equal(error.errno, errno.EINVAL, "error")
                outcome["refused"] += 1
            finally:
                device.remove()

    def unloader():
        try:
            for _ in range(40 // min(SLOW, 2)):
                run = subprocess.run(["rmmod", "dm_overlaybd"], capture_output=True, text=True, check=False)
                if run.returncode:
                    # There were users before rmmod's check, or new ones came after it.
                    check(any(why in run.stderr for why in ("in use", "busy", "temporarily unavailable")),
                          f"rmmod: {run.stderr}")
                    time.sleep(0.01)
                    continue
                outcome["unloaded"] += 1
                time.sleep(0.02)
                subprocess.run(["insmod", path], check=True)
        finally:
            stop.set()

    together(maker, maker, unloader)
    note(f"{outcome}")
    check(outcome["made"] > 2 and outcome["unloaded"] > 2, f"{outcome}")


add(f"zfile: {CYCLES} cycles of every operation concurrently, with readers", comes_back, zfile_operations, timeout=900)
add(f"lsmt over zfile: {CYCLES} cycles of every operation concurrently, with readers", comes_back, lsmt_operations,
    timeout=900)
add(f"{DEVICES} devices at the same time", comes_back, many_devices, timeout=900)
for each_name, each_raw in (("LZ4 in 4 KiB", RAW), ("LZ4 in 64 KiB", image.zfile(DATA, image.LZ4, 65536)),
                            ("zstd in 64 KiB", image.zfile(DATA, image.ZSTD, 65536)),
                            # The checksum of a frame is computed from the output memory, which may have changed by
                            # then.
                            ("zstd in 4 KiB with checksums",
                             image.zfile(DATA, image.ZSTD, compressor=lambda data: image.zstd_frame(data, True)))):
    for each_cache in ("cache_blocks 0", "cache_blocks 64", "cache_all"):
        add(f"{each_name}, {each_cache}: memory is changed and unmapped while it is read into", scribbled,
            each_raw, each_cache)


if __name__ == "__main__":
    main()
