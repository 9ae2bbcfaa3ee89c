# SPDX-License-Identifier: GPL-2.0
"""How much memory the kernel uses, to see that it comes back; and somebody who takes it all."""

import mmap
import os
import time

from .ktap import alone


def meminfo():
    """/proc/meminfo in KiB."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return {row.split(":")[0]: int(row.split()[1]) for row in file}


def _on_cpu_lists():
    """KiB that are free, but not counted so: each CPU keeps some, tens of MiB after much has been freed."""
    with open("/proc/zoneinfo", encoding="ascii") as file:
        return sum(int(row.split()[1]) for row in file if row.split()[:1] == ["count:"]) * 4


def drop_caches():
    """Has the kernel give back what it caches, pages that reads of zfile use again among it."""
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


def kernel_memory():
    """KiB that are neither free nor anybody's data: slab, pages, vmalloc, per-CPU and all."""
    drop_caches()
    fields = meminfo()
    used = fields["MemTotal"] - fields["MemFree"] - fields["AnonPages"] - fields["Cached"] - fields["Buffers"]
    return used - _on_cpu_lists()


def grown_after(rounds, function, *args):
    """KiB of kernel memory that so many rounds have taken, at least: others take and free some, too."""
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
    """A process that takes all memory but so many KiB until it is killed; gives its number."""
    child = os.fork()
    if child:
        return child
    try:
        # What others have open, such as devices, is none of its business.
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
