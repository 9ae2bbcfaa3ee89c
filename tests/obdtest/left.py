# SPDX-License-Identifier: GPL-2.0
"""What obdsetup makes besides its stacks' disks, and what it must not leave behind: devices, loop devices, locks."""

import contextlib
import glob
import os
import time

from .ktap import SLOW, equal
from .programs import close, quietly, run

_LOCKS = "/run/obdsetup"


def devices():
    """Returns the UUIDs of obdsetup's mapped devices by their names, including devices without a table, and
    partitions."""
    rows = run("dmsetup", "info", "-c", "--noheadings", "--separator", "|", "-o", "name,uuid").splitlines()
    # If there is no device, dmsetup prints a sentence instead.
    rows = [row.split("|") for row in rows if "|" in row]
    return {name: uuid for name, uuid in rows if "OVERLAYBD-" in uuid}


def loops():
    """Returns the files of the loop devices by their names."""
    files = {}
    for path in glob.glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            with open(path, encoding="utf-8", errors="replace") as file:
                files[path.split("/")[3]] = file.read().rstrip("\n")
    return files


def own_loops(*paths):
    """Returns the loop devices over files at or below these paths, and those over files that obdsetup has in memory."""
    return {name: file for name, file in loops().items() if "obdsetup" in file or file.startswith(paths)}


def locks(name=""):
    """Returns the lock files of the stacks whose names begin with name, and those of devices."""
    return sorted(glob.glob(f"{_LOCKS}/{name}*") + glob.glob(f"{_LOCKS}/.*"))


def eventually(what, found, wanted):
    """Waits until found() returns the wanted value. Fails the test if that takes longer than 5 s (more on slow
    kernels)."""
    got = None
    for _ in range(100 * SLOW):
        got = found()
        if got == wanted:
            break
        time.sleep(0.05)
    equal(got, wanted, what)


def nothing_left(*paths):
    """Checks that obdsetup has left nothing behind. Of the loop devices, those over files at or below these paths count
    (by default, the current directory)."""
    paths = paths or (os.getcwd(),)
    eventually("devices that are left", devices, {})
    eventually("loop devices that are left", lambda: own_loops(*paths), {})
    eventually("locks that are left", locks, [])


def clear(*names):
    """Closes these stacks, and removes all devices of obdsetup that a failed test has left."""
    for name in names:
        close(name)
    # The names don't show which device is above which.
    for _ in range(4):
        for name in devices():
            quietly("dmsetup", "remove", "--retry", name)
