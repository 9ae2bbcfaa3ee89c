# SPDX-License-Identifier: GPL-2.0
"""Fault injection by the kernel: allocations and requests fail.

Needs a kernel with FAULT_INJECTION, such as the debug kernel; on others, the functions raise Skip. Faults are
switched off at the end of the test.
"""

import functools
import os

from .ktap import Skip, defer

_DEBUG = "/sys/kernel/debug"
_ALLOCATORS = {
    "failslab": {"cache_filter": "N", "ignore_gfp_wait": "N"},
    "fail_page_alloc": {"min_order": 0, "ignore_gfp_highmem": "N", "ignore_gfp_wait": "N"},
}
_MODULE = "dm_overlaybd"
_MANY = 1000000000


def _write(path, value):
    with open(path, "w", encoding="ascii") as file:
        file.write(str(value))


def _set(which, **settings):
    if not os.path.isdir(f"{_DEBUG}/{which}"):
        raise Skip(f"this kernel has no fault injection ({which})")
    for name, value in settings.items():
        _write(f"{_DEBUG}/{which}/{name.replace('_', '-')}", value)


def _read(path):
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def _stop(which):
    """Stops the faults. Returns how many there were."""
    left = int(_read(f"{_DEBUG}/{which}/times"))
    _set(which, probability=0, times=0)
    return _MANY - left if left else 0


def _prepare(which, **settings):
    """Sets the faults up, without messages in the kernel's log. Nothing fails yet."""
    _set(which)
    settings |= {"task_filter": "N", "verbose": 0, "interval": 1, "space": 0}
    before = {name: _read(f"{_DEBUG}/{which}/{name.replace('_', '-')}") for name in settings}
    # Undone last: without these filters, a fault that is still on would hit the whole system.
    defer(lambda: _set(which, **before))
    defer(_stop, which)
    _set(which, probability=0, times=_MANY, **settings)


@functools.lru_cache
def _module_text(_loaded):
    """Returns the start of the module's code, and an upper bound of its end. _loaded differs for each load of the
    module, so that the cached result is not used for another load."""
    inside, outside = [], []
    with open("/proc/kallsyms", encoding="utf-8") as file:
        for row in file:
            address, kind, *rest = row.split()
            if kind in "tT":
                (inside if rest[-1] == f"[{_MODULE}]" else outside).append(int(address, 16))
    start, last = min(inside), max(inside)
    behind = min((address for address in outside if address > last), default=last + 65536)
    return start, min(behind, last + 65536)


def _prepare_allocators(module_only):
    for which in _ALLOCATORS:
        _set(which)
    where = {}
    if module_only:
        start, end = _module_text(os.stat(f"/sys/module/{_MODULE}").st_ino)
        where = {"stacktrace_depth": 32, "require_start": hex(start), "require_end": hex(end)}
    for which, settings in _ALLOCATORS.items():
        _prepare(which, **settings, **where)


def possible():
    """Returns whether this kernel can inject all these faults."""
    return all(os.path.isdir(f"{_DEBUG}/{which}") for which in (*_ALLOCATORS, "fail_make_request"))


def requests(*devices, probability):
    """Makes the given percentage of the requests to devices fail. Returns the function that stops the faults."""
    which = "fail_make_request"
    _prepare(which)
    for device in devices:
        path = f"/sys/block/{os.path.basename(device.path)}/make-it-fail"
        _write(path, 1)
        defer(_write, path, 0)
    _set(which, probability=probability)
    return lambda: _stop(which)


def allocations(probability):
    """Makes the given percentage of the allocations that the module causes fail. Returns the function that stops the
    faults and returns their number."""
    _prepare_allocators(module_only=True)
    # Drop the pages in the pool: reads that reuse them don't allocate.
    _write("/proc/sys/vm/drop_caches", 2)
    for which in _ALLOCATORS:
        _set(which, probability=probability)
    return lambda: sum(_stop(which) for which in _ALLOCATORS)


def contiguous_pages(order=1):
    """Makes the allocations of this order and above that the module causes fail, as if memory were fragmented. Returns
    the function that stops the faults and returns their number."""
    _prepare_allocators(module_only=True)
    _write("/proc/sys/vm/drop_caches", 2)
    _set("fail_page_alloc", min_order=order, probability=100)
    return lambda: _stop("fail_page_alloc")


class Nth:
    """Makes the nth allocation of this thread fail, once. Counts all allocations, or only those that the module
    causes."""

    def __init__(self, module_only=False):
        _prepare_allocators(module_only)
        self.fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
        defer(os.close, self.fd)

    def arm(self, number):
        os.pwrite(self.fd, b"%d" % number, 0)

    def disarm(self):
        """Stops counting. Returns whether the armed allocation has failed."""
        left = int(os.pread(self.fd, 32, 0))
        os.pwrite(self.fd, b"0", 0)
        return left == 0
