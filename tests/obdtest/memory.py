# SPDX-License-Identifier: GPL-2.0
"""Measures the kernel's memory, to find leaks. Starts a process that uses up all memory."""

import mmap
import os
import time

from .ktap import alone


def meminfo():
    """Returns /proc/meminfo in KiB."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return {row.split(":")[0]: int(row.split()[1]) for row in file}


def page_cache():
    """Returns the KiB of page cache of files."""
    return meminfo()["Cached"]


def _on_cpu_lists():
    """Returns the KiB of free memory that MemFree does not include: each CPU has lists of free pages, with tens of MiB
    after much memory was freed."""
    with open("/proc/zoneinfo", encoding="ascii") as file:
        return sum(int(row.split()[1]) for row in file if row.split()[:1] == ["count:"]) * 4


def drop_caches():
    """Makes the kernel drop its caches, including the pages that zfile keeps in its pool."""
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


def kernel_memory():
    """Returns the KiB of the kernel's own memory: slab, pages, vmalloc, per-CPU and so on."""
    drop_caches()
    fields = meminfo()
    used = fields["MemTotal"] - fields["MemFree"] - fields["AnonPages"] - fields["Cached"] - fields["Buffers"]
    return used - _on_cpu_lists()


def grown_after(rounds, function, *args):
    """Calls function rounds times. Returns by how many KiB the kernel's memory has grown: the lowest result of up to
    three tries, since other users of memory add to it."""
    grown = []
    for _ in range(3):
        alone(function, *args)
        before = kernel_memory()
        for _ in range(rounds):
            alone(function, *args)
        grown.append(kernel_memory() - before)
        if grown[-1] < 1024:
            break
    return min(grown)


def hog(leave):
    """Starts a process that uses up all memory except for about `leave` KiB, until it is killed. Returns its process
    ID."""
    child = os.fork()
    if child:
        return child
    try:
        # Close inherited files, such as open devices.
        os.closerange(3, 1024)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
        taken = []
        while True:
            if meminfo()["MemAvailable"] > leave + (8 << 10):
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
                taken.append(mmap.mmap(-1, 8 << 20, flags=flags))
            else:
                time.sleep(0.02)
    finally:
        os._exit(0)
