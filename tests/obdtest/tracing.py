# SPDX-License-Identifier: GPL-2.0
"""The kernel's trace events, in a trace instance for each test."""

import os

from .ktap import Skip, defer

_TRACING = "/sys/kernel/debug/tracing"


def _write(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


class Trace:
    """Records events from now on. Each argument is a pair of an event and its filter."""

    count = 0

    def __init__(self, *events):
        if not os.path.isdir(f"{_TRACING}/instances"):
            raise Skip("this kernel has no tracing")
        Trace.count += 1
        self.path = f"{_TRACING}/instances/obdtest-{os.getpid()}-{Trace.count}"
        os.mkdir(self.path)
        defer(os.rmdir, self.path)
        for event, only in events:
            place = f"{self.path}/events/{event.replace(':', '/')}"
            _write(f"{place}/filter", only)
            _write(f"{place}/enable", "1")
            defer(_write, f"{place}/enable", "0")

    def lines(self):
        """Returns the events since the last call as [name, text], without time stamps."""
        with open(f"{self.path}/trace", encoding="utf-8", errors="replace") as file:
            rows = [row.rstrip("\n") for row in file if not row.startswith("#")]
        _write(f"{self.path}/trace", "")
        return [row.split(": ", 2)[1:] for row in rows]


def device_filter(device):
    """Returns the filter for events of a block device."""
    major, minor = map(int, device.number.split(":"))
    return f"dev == {major << 20 | minor}"
