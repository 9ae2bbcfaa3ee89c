#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The module's parameters, except those of the cache."""

import errno
import os
import subprocess

from obdtest import dm, image
from obdtest.disk import Disk, same_bytes
from obdtest.ktap import check, defer, equal, main, test
from obdtest.module import MODULE, module_file
from obdtest.tracing import Trace

DATA = image.sample(300000, 63)
DIRECTORY = "/sys/module/dm_overlaybd/parameters"


def get(name):
    with open(f"{DIRECTORY}/{name}", encoding="ascii") as file:
        return file.read().strip()


def put(name, value):
    with open(f"{DIRECTORY}/{name}", "w", encoding="ascii") as file:
        file.write(str(value))


@test("at_once_bytes is the size of the largest read that is decompressed without a worker, with LZ4")
def at_once():
    default = get("at_once_bytes")
    equal(default, "16384", "at_once_bytes")
    defer(put, "at_once_bytes", default)
    for algorithm in image.NAMES:
        raw = image.zfile(DATA, algorithm)
        disk = Disk(dm.zfile(dm.Loop(raw), len(raw), len(DATA)))
        trace = Trace(("workqueue:workqueue_queue_work", 'workqueue ~ "overlaybd*"'))
        for limit, length, few in ((0, 4096, False), (4096, 4096, True), (4096, 8192, False), (16384, 12288, True)):
            put("at_once_bytes", limit)
            trace.lines()
            count = 32
            for nth in range(count):
                at = nth * 4096
                same_bytes(disk.read(at, length), DATA[at:at + length], f"{length} bytes at {at}")
            works = sum(name.endswith("workqueue_queue_work") for name, _ in trace.lines())
            what = f"{works} work items for {count} reads of {length} with {limit}, {image.NAMES[algorithm]}"
            # If another task wants the CPU, a worker decompresses.
            if few and algorithm == image.LZ4:
                check(works <= count // 2, what)
            else:
                check(works > count // 2, what)


@test("values that are not one number of 0 or more are refused")
def refused():
    for name in ("at_once_bytes", "cache_limit_bytes"):
        before = get(name)
        for value in ("much", "-1", "1 2"):
            try:
                put(name, value)
            except OSError as error:
                check(error.errno in (errno.EINVAL, errno.ERANGE), f"{name}: {error}")
            else:
                check(False, f"{name} accepts {value!r}")
        equal(get(name), before, name)


@test("read-only parameters are refused when the module is loaded")
def read_only():
    path = module_file()
    defer(lambda: os.path.exists(MODULE) or subprocess.run(["insmod", path], check=True))
    subprocess.run(["rmmod", "dm_overlaybd"], check=True)
    run = subprocess.run(["insmod", path, "cache_bytes=1"], capture_output=True, text=True, check=False)
    check(run.returncode > 0 and os.strerror(errno.EPERM) in run.stderr, f"{run.returncode}, {run.stderr!r}")
    check(not os.path.exists(MODULE), "the module is loaded")


if __name__ == "__main__":
    main()
