#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Which CPUs run workers: all that are online and not isolated, also while CPUs go offline and online.

These tests cover most if some CPUs are offline or isolated from boot; scripts/check.sh also runs them that way.
"""

import glob
import os
import random
import re
import subprocess
import threading
import time

from obdtest import dm, image
from obdtest.disk import Disk, verify_random
from obdtest.ktap import SLOW, Failure, Skip, check, defer, equal, main, note, same_bytes, test
from obdtest.module import module_file
from obdtest.programs import need_module

SYSFS = "/sys/devices/system/cpu"
TRACING = "/sys/kernel/tracing"
SIZE = 2 << 20
# Slow to decompress, so that the workers can be observed.
DATA = image.sample(SIZE, 81)
RAW = image.zfile(DATA, image.ZSTD, 65536)
WORKER = re.compile(r"kworker/(\d+):\d+([-+])overlaybd")


def cpus(name):
    """Returns the CPUs in a CPU list of sysfs."""
    with open(f"{SYSFS}/{name}", encoding="ascii") as file:
        text = file.read().strip()
    out = set()
    for part in text.replace("(null)", "").split(",") if text else []:
        first, _, last = part.partition("-")
        if first:
            out.update(range(int(first), int(last or first) + 1))
    return out


def housekeeping():
    """Returns the CPUs that may run workers."""
    isolated = cpus("isolated")
    if os.path.exists(f"{SYSFS}/nohz_full"):
        isolated |= cpus("nohz_full")
    return cpus("online") - isolated


def ram_disk(content):
    """Makes a RAM disk. It completes reads on the submitting CPU, so the CPU of a reader determines which worker
    runs."""
    subprocess.run(["rmmod", "brd"], capture_output=True, check=False)
    need_module("brd", options=("rd_nr=1", "rd_size=8192"))
    defer(subprocess.run, ["rmmod", "brd"])
    with open("/dev/ram0", "wb") as file:
        file.write(content)
    return "/dev/ram0"


def zfile():
    device = dm.create(dm.line(0, SIZE // 512, "zfile", ram_disk(RAW), len(RAW)))
    # A first read, which allocates memory that later reads use again.
    same_bytes(Disk(device).read(0, 65536), DATA[:65536], "first block")
    return device


def workers(states):
    """Returns the CPUs with kernel threads that run a worker of the module now (state +), or ran one last (state -)."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/comm"):
        try:
            with open(path, encoding="utf-8") as file:
                match = WORKER.match(file.read())
        except OSError:
            continue
        if match and match.group(2) in states:
            found.add(int(match.group(1)))
    return found


class Reader(threading.Thread):
    """A thread that reads and compares until stop() is called."""

    def __init__(self, device, seed):
        super().__init__()
        self.device, self.seed = device, seed
        self.over, self.count, self.error = False, 0, None
        self.start()

    def run(self):
        try:
            disk = Disk(self.device)
            rng = random.Random(self.seed)
            while not self.over:
                at = rng.randrange(SIZE // 65536 - 16) * 65536
                same_bytes(disk.read(at, 1 << 20), DATA[at:at + (1 << 20)], f"1 MiB at {at}")
                verify_random(disk, DATA, rng, 1)
                self.count += 1
            disk.close()
        except (Failure, OSError) as error:
            self.error = error

    def stop(self):
        self.over = True
        self.join()
        check(self.error is None, f"reader {self.seed}: {self.error}")
        check(self.count > 0, f"reader {self.seed} has read nothing")


class Load:
    """For some seconds, reads more from a device than its workers can process. If cpu is given, the readers run on that
    CPU. They are another process, since threads of this one would wait for the lock of the interpreter."""

    def __init__(self, device, seconds, cpu=None):
        where = [] if cpu is None else [f"--cpus_allowed={cpu}"]
        self.fio = subprocess.Popen(
            ["fio", "--name=obd", f"--filename={device.path}", "--readonly", "--rw=randread", "--direct=1",
             "--ioengine=libaio", "--iodepth=32", "--bs=1m", "--numjobs=2", "--time_based", f"--runtime={seconds}",
             "--thread", "--minimal", *where], stdout=subprocess.DEVNULL)
        defer(self.stop)

    def runs(self):
        return self.fio.poll() is None

    def stop(self):
        self.fio.kill()
        self.fio.wait()


def used(device, cpu, wanted):
    """Returns the CPUs that run workers for a reader on one CPU. Waits until all wanted CPUs do, then looks for
    others."""
    load = Load(device, 3600, cpu)
    found = set()
    try:
        enough = time.monotonic() + 60 * SLOW
        while time.monotonic() < enough and not wanted <= found:
            found |= workers("+")
        # The name of an idle kernel thread shows its last work for a long time.
        for _ in range(5):
            found |= workers("+-") - wanted
            time.sleep(0.02)
        has(device, f"content beside a reader on CPU {cpu}")
        check(load.runs(), "the reader has ended")
    finally:
        load.stop()
    return found


@test("a reader on any CPU uses all CPUs that are online and not isolated, and no others")
def all_work():
    device = zfile()
    wanted = housekeeping()
    possible, online = cpus("possible"), cpus("online")
    note(f"{len(possible)} CPUs possible, online: {sorted(online)}, not isolated: {sorted(wanted)}")
    check(wanted, "no CPU may run workers")
    for cpu in sorted(online):
        equal(sorted(used(device, cpu, wanted)), sorted(wanted), f"CPUs that work for a reader on CPU {cpu}")


def removable():
    """Returns CPUs that can all be offline at the same time: at least one CPU stays online."""
    found = sorted(cpu for cpu in cpus("online") if os.path.exists(f"{SYSFS}/cpu{cpu}/online"))
    # The one that stays must not be isolated: otherwise no CPU that may run workers is left.
    return found if housekeeping() - set(found) else sorted(set(found) - {min(housekeeping())})


def switch(cpu, on):
    """Takes a CPU offline, or online."""
    with open(f"{SYSFS}/cpu{cpu}/online", "w", encoding="ascii") as file:
        file.write("1" if on else "0")


def brought_back(found):
    for cpu in found:
        if cpu not in cpus("online"):
            switch(cpu, True)


@test("CPUs go offline and online under load")
def hotplug():
    found = removable()
    if not found:
        raise Skip("no CPU can be taken away")
    device = zfile()
    before = cpus("online")
    counted = [0, 0, 0]
    defer(brought_back, found)
    readers = [Reader(device, seed) for seed in range(3)]
    try:
        for nth in range(4):
            for cpu in found:
                switch(cpu, False)
            check(cpus("online") == before - set(found), "CPUs are still online")
            counts = [reader.count for reader in readers]
            limit = time.monotonic() + 30 * SLOW
            while any(reader.count == count and not reader.error for reader, count in zip(readers, counts)):
                check(time.monotonic() < limit, f"reads hang without CPUs {found}, round {nth}")
                time.sleep(0.01)
            # The counts of a CPU are not lost when it goes offline.
            counts = [int(device.info()[nr]) for nr in (5, 6, 7)]
            check(all(now > then for now, then in zip(counts, counted)), f"counters went from {counted} to {counts}")
            counted = counts
            for cpu in found:
                switch(cpu, True)
            time.sleep(0.05)
    finally:
        brought_back(found)
        for reader in readers:
            reader.stop()
    equal(cpus("online"), before, "CPUs that are online")
    wanted = housekeeping()
    for cpu in sorted(wanted):
        equal(sorted(used(device, cpu, wanted)), sorted(wanted), f"CPUs that work for a reader on CPU {cpu} afterwards")


def contexts():
    """Returns the number of codec contexts: each has one buffer of 64 KiB, which has a guard page."""
    with open("/proc/vmallocinfo", encoding="ascii") as file:
        return sum(row.split()[1] == "69632" for row in file)


@test("a CPU that was offline from boot runs workers once it is online")
def comes_up():
    """A CPU that comes online can run a worker, and gets its own context with the next device."""
    if not cpus("present") - cpus("online"):
        raise Skip("all CPUs were online at boot")
    module = module_file()
    subprocess.run(["rmmod", "dm_overlaybd"], check=True)
    subprocess.run(["insmod", module], check=True)
    absent = sorted(cpus("present") - cpus("online"))
    before = contexts()
    device = zfile()
    equal(contexts() - before, len(cpus("online")), "codec contexts")
    defer(switch, absent[0], False)
    switch(absent[0], True)
    wanted = housekeeping()
    check(absent[0] in wanted, f"CPU {absent[0]} may not run workers")
    equal(sorted(used(device, absent[0], wanted)), sorted(wanted), f"CPUs that work for a reader on CPU {absent[0]}")
    same_bytes(Disk(dm.create(dm.line(0, SIZE // 512, "zfile", "/dev/ram0", len(RAW)))).read(0, 65536), DATA[:65536],
               "first block of another device")
    equal(contexts() - before, len(cpus("online")), "codec contexts with one device more")
    for cpu in (absent[0], min(wanted)):
        equal(sorted(used(device, cpu, wanted)), sorted(wanted), f"CPUs that work for a reader on CPU {cpu}")


def in_reserve():
    """Returns the number of rescuer threads of the module's workqueues."""
    count = 0
    for path in glob.glob("/proc/[0-9]*/comm"):
        try:
            with open(path, encoding="utf-8") as file:
                count += file.read().startswith("kworker/R-overl")
        except OSError:
            continue
    return count


def has(device, what):
    """Checks the first MiB of a device."""
    disk = Disk(device)
    same_bytes(disk.read(0, 1 << 20), DATA[:1 << 20], what)
    disk.close()


@test("devices share one rescuer thread, but those on a mapped device have their own")
def reserve():
    loop = dm.Loop(RAW)
    equal(in_reserve(), 1, "threads without a device")
    devices = [dm.create(dm.line(0, SIZE // 512, "zfile", loop.path, len(RAW))) for _ in range(8)]
    equal(in_reserve(), 1, "threads with 8 devices on a loop device")
    outer = image.zfile(DATA[:1 << 20], image.LZ4)
    inner = image.zfile(outer)
    lower = dm.zfile(dm.Loop(inner), len(inner), len(outer))
    equal(in_reserve(), 1, "threads with one device more")
    upper = dm.create(dm.line(0, (1 << 20) // 512, "zfile", lower.path, len(outer)))
    equal(in_reserve(), 2, "threads with a device on a device")
    has(upper, "content of the upper device")
    above_linear = dm.create(dm.line(0, SIZE // 512, "zfile", dm.linear(loop, loop.size // 512, readonly=True).path,
                                     len(RAW)))
    equal(in_reserve(), 3, "threads with a device on a linear one")
    has(above_linear, "content of the device on a linear one")
    has(devices[7], "content of the last device")
    upper.remove()
    above_linear.remove()
    equal(in_reserve(), 1, "threads when these are gone")


def traced():
    """Returns the directory of tracefs, or None if the kernel can't trace functions."""
    if not os.path.exists(f"{TRACING}/available_tracers"):
        subprocess.run(["mount", "-t", "tracefs", "nodev", TRACING], capture_output=True, check=False)
    try:
        with open(f"{TRACING}/available_tracers", encoding="ascii") as file:
            return TRACING if "function" in file.read().split() else None
    except OSError:
        return None


@test("workers that are always busy don't block Tasks RCU")
def busy_workers():
    """Stopping a tracer waits until each task has passed a quiescent state of Tasks RCU. A worker that always has work
    must pass such states, too."""
    if not traced():
        raise Skip("this kernel has no tracing")
    instance = f"{TRACING}/instances/obdtest"
    os.mkdir(instance)
    defer(os.rmdir, instance)
    seconds = 30
    load = Load(zfile(), seconds)
    time.sleep(3)
    start = time.monotonic()
    with open(f"{instance}/set_ftrace_filter", "w", encoding="ascii") as file:
        file.write("dm_table_destroy")
    for tracer in ("function", "nop"):
        with open(f"{instance}/current_tracer", "w", encoding="ascii") as file:
            file.write(tracer)
    took = time.monotonic() - start
    note(f"{took:.1f} s")
    check(load.runs() and took < seconds / 2, f"stopping a tracer took {took:.1f} s while workers were always busy")


def cpusets():
    """Returns the root of the control groups with cpusets, or None if the kernel has none."""
    root = "/sys/fs/cgroup"
    if not os.path.exists(f"{root}/cgroup.controllers"):
        if subprocess.run(["mount", "-t", "cgroup2", "nodev", root], capture_output=True, check=False).returncode:
            return None
        defer(subprocess.run, ["umount", root])
    with open(f"{root}/cgroup.controllers", encoding="ascii") as file:
        return root if "cpuset" in file.read().split() else None


@test("a CPU that a cpuset isolates runs no more workers")
def isolated_later():
    """A cpuset partition isolates a CPU whose worker is always busy."""
    root = cpusets()
    if not root:
        raise Skip("this kernel has no cpuset")
    check(len(housekeeping()) > 1, "only one CPU may run workers")
    cpu = max(housekeeping())
    group = f"{root}/obdtest"
    load = Load(zfile(), 60)
    limit = time.monotonic() + 20
    while cpu not in workers("+"):
        check(time.monotonic() < limit, f"CPU {cpu} runs no worker at all")
    with open(f"{os.path.dirname(group)}/cgroup.subtree_control", "w", encoding="ascii") as file:
        file.write("+cpuset")
    os.mkdir(group)
    defer(os.rmdir, group)
    for name, value in (("cpus", str(cpu)), ("cpus.partition", "isolated")):
        with open(f"{group}/cpuset.{name}", "w", encoding="ascii") as file:
            file.write(value)
    with open(f"{group}/cpuset.cpus.partition", encoding="ascii") as file:
        equal(file.read(), "isolated\n", "partition")
    time.sleep(4)
    found = set()
    for _ in range(20):
        found |= workers("+")
        time.sleep(0.02)
    check(load.runs() and found, "no CPU runs workers")
    check(cpu not in found, f"CPU {cpu} runs workers though it is isolated")


if __name__ == "__main__":
    main()
