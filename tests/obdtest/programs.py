# SPDX-License-Identifier: GPL-2.0
"""Processes of obdsetup, and of the programs that it starts."""

import contextlib
import glob
import os

_NAMES = (b"dmsetup", b"obdsetup", b"obdsetup-program", b"ipcrm")
# Commands of dmsetup that udev's rules run.
_OF_UDEV = (b"udevflags", b"udevcomplete")


def running():
    """Returns the command lines of all that run, without those that udevd has started."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            with open(path, "rb") as file:
                words = file.read().split(b"\0")
            if os.path.basename(words[0]) in _NAMES and not set(_OF_UDEV) & set(words):
                found.append(b" ".join(words).decode())
    return found
