# SPDX-License-Identifier: GPL-2.0
"""Faults that the kernel makes on purpose: allocations and requests that fail.

Needs a kernel with FAULT_INJECTION, as the debug kernel is; elsewhere the functions raise Skip.
"""

import os

from .ktap import Skip, defer

_DEBUG = "/sys/kernel/debug"
_ALLOCATORS = ("failslab", "fail_page_alloc")
_MODULE = "dm_overlaybd"


def _write(path, value):
    with open(path, "w", encoding="ascii") as file:
        file.write(str(value))


def _set(which, **settings):
    if not os.path.isdir(f"{_DEBUG}/{which}"):
        raise Skip(f"this kernel has no fault injection ({which})")
    for name, value in settings.items():
        _write(f"{_DEBUG}/{which}/{name.replace('_', '-')}", value)


def _reset(which):
    _set(which, probability=0, times=0, task_filter="N")


def _start(which, probability, **settings):
    """Lets so many of a hundred calls fail, without a word in the kernel's log."""
    _reset(which)
    defer(_reset, which)
    _set(which, verbose=0, interval=1, space=0, times=-1, **settings)
    _set(which, probability=probability)


def _module_text():
    """Where the module's code lies: its lowest and behind its highest address."""
    inside, outside = [], []
    with open("/proc/kallsyms", encoding="utf-8") as file:
        for row in file:
            address, kind, *rest = row.split()
            if kind in "tT":
                (inside if rest[-1] == f"[{_MODULE}]" else outside).append(int(address, 16))
    start, last = min(inside), max(inside)
    behind = min((address for address in outside if address > last), default=last + 65536)
    return start, min(behind, last + 65536)


def requests(*devices, probability=100, times=-1):
    """Lets requests of devices fail; gives the function that ends it."""
    _start("fail_make_request", 0)
    for device in devices:
        path = f"/sys/block/{os.path.basename(device.path)}/make-it-fail"
        _write(path, 1)
        defer(lambda path=path: os.path.exists(path) and _write(path, 0))
    _set("fail_make_request", times=times, probability=probability)
    return lambda: _reset("fail_make_request")


def allocations(probability=100):
    """Lets allocations fail that are made by the module or by what it calls; gives the function
    that ends it."""
    start, end = _module_text()
    for which in _ALLOCATORS:
        extra = {"min_order": 0, "ignore_gfp_highmem": "N"} if which == "fail_page_alloc" else {"cache_filter": "N"}
        _start(which, 0, ignore_gfp_wait="N", stacktrace_depth=32, require_start=hex(start), require_end=hex(end),
               **extra)
        defer(lambda which=which: _set(which, require_start="0x0", require_end=hex((1 << 64) - 1)))
    for which in _ALLOCATORS:
        _set(which, probability=probability)
    return lambda: [_reset(which) for which in _ALLOCATORS]


class Nth:
    """Lets the nth allocation of this thread fail, once. The files are open beforehand, so that
    only what the caller does counts."""

    def __init__(self):
        for which in _ALLOCATORS:
            extra = {"min_order": 0, "ignore_gfp_highmem": "N"} if which == "fail_page_alloc" else {"cache_filter": "N"}
            _start(which, 0, ignore_gfp_wait="N", **extra)
        self.fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
        defer(os.close, self.fd)

    def arm(self, number):
        os.pwrite(self.fd, b"%d" % number, 0)

    def disarm(self):
        """Tells whether an allocation has failed."""
        left = int(os.pread(self.fd, 32, 0))
        os.pwrite(self.fd, b"0", 0)
        return left == 0
