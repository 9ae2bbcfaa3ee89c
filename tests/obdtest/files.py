# SPDX-License-Identifier: GPL-2.0
"""Files and directories of a test, and mounts."""

import os
import shutil
import tempfile

from .ktap import defer
from .programs import run


def work_directory(place=None):
    """Makes a directory, which is removed at the end of the test. Returns its path."""
    path = tempfile.mkdtemp(prefix="obdtest-", dir=place)
    defer(shutil.rmtree, path)
    return path


def enter_work_directory():
    """Makes a directory and works in it until the end of the test. Returns its path."""
    path = work_directory()
    defer(os.chdir, os.getcwd())
    os.chdir(path)
    return path


def read(path, start=0, length=-1):
    """Returns the bytes of a file, or of a part of it."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)


def write(path, content, at=None):
    """Makes a file of these bytes, or overwrites bytes of an existing file from byte `at` on. Returns the path."""
    with open(path, "wb" if at is None else "r+b") as file:
        file.seek(at or 0)
        file.write(content)
    return path


def mount(device, where, options, kind=None):
    """Mounts a device on a directory until the end of the test. Makes the directory if it is missing."""
    os.makedirs(where, exist_ok=True)
    run("mount", *(["-t", kind] if kind else []), "-o", options, device, where)
    defer(umount, where)


def umount(where):
    """Unmounts the file system that is mounted on a directory, if there is one."""
    if os.path.ismount(where):
        run("umount", where)
