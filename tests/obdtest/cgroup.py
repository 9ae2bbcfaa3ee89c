# SPDX-License-Identifier: GPL-2.0
"""Control groups of the unified hierarchy, with one controller."""

import os
import tempfile
import time

from .ktap import Failure, Skip, defer

_mounted = None


def _hierarchy():
    """Returns where the unified hierarchy is mounted; mounts it if it isn't."""
    with open("/proc/mounts", encoding="ascii") as mounts:
        for row in mounts:
            fields = row.split()
            if fields[2] == "cgroup2":
                return fields[1]
    path = tempfile.mkdtemp(prefix="obdtest-cgroup-")
    defer(os.rmdir, path)
    if os.system(f"mount -t cgroup2 none {path}"):
        raise Skip("this kernel has no control groups")
    defer(os.system, f"umount {path}")
    return path


def _write(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


class Group:
    """A control group, removed at the end of the test."""

    def __init__(self, controller="io"):
        top = _hierarchy()
        with open(f"{top}/cgroup.controllers", encoding="ascii") as file:
            if controller not in file.read().split():
                raise Skip(f"this kernel has no controller {controller} for control groups")
        _write(f"{top}/cgroup.subtree_control", f"+{controller}")
        self.path = tempfile.mkdtemp(prefix="obdtest-", dir=top)
        defer(self._remove)

    def _remove(self):
        # A process may be in the group for a short time after waitpid() has returned.
        for _ in range(100):
            try:
                os.rmdir(self.path)
                return
            except OSError:
                time.sleep(0.05)
        raise Failure(f"{self.path} cannot be removed")

    def enter(self):
        """Moves this process to the group."""
        self.write("cgroup.procs", "0")

    def write(self, name, text):
        _write(f"{self.path}/{name}", text)

    def read(self, name):
        with open(f"{self.path}/{name}", encoding="ascii") as file:
            return file.read()

    def run(self, function, *args):
        """Calls a function in a process of the group. Fails if the function raises."""
        child = os.fork()
        if not child:
            status = 1
            try:
                self.enter()
                function(*args)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise Failure("the process in the control group has failed")

    def stat(self, device):
        """Returns the bytes and the number of requests that the group has read from a device."""
        with open(f"{self.path}/io.stat", encoding="ascii") as file:
            for row in file:
                number, *fields = row.split()
                if number == device.number:
                    found = dict(field.split("=") for field in fields)
                    return int(found.get("rbytes", 0)), int(found.get("rios", 0))
        return 0, 0

    def limit(self, device, bytes_per_second):
        """Limits the group's reads from a device, in bytes per second."""
        if not os.path.exists(f"{self.path}/io.max"):
            raise Skip("this kernel has no io.max")
        _write(f"{self.path}/io.max", f"{device.number} rbps={bytes_per_second}")
