# SPDX-License-Identifier: GPL-2.0
"""The module under test: its file, its users, loading and unloading."""

import ctypes
import os
import platform
import subprocess

from .ktap import Skip

MODULE = "/sys/module/dm_overlaybd"
_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}


def use_count():
    """Returns the reference count of the module: each target of a table has one, for example."""
    with open(f"{MODULE}/refcnt", encoding="ascii") as file:
        return int(file.read())


def module_file():
    """Returns the file that the module was loaded from, to load it again."""
    try:
        with open("/run/vm/env", encoding="utf-8") as file:
            path = next(row.partition("=")[2].strip() for row in file if row.startswith("VM_MODULE="))
    except (OSError, StopIteration):
        path = subprocess.run(["modinfo", "-n", "dm_overlaybd"], capture_output=True, text=True,
                              check=False).stdout.strip()
    if not os.path.exists(path):
        raise Skip("the module's file is not known")
    return path


def finit_module(fd):
    """Loads the module from an open file. Returns 0 or the errno."""
    if platform.machine() not in _FINIT_MODULE:
        raise Skip(f"the number of finit_module on {platform.machine()} is not known to this test")
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.syscall(ctypes.c_long(_FINIT_MODULE[platform.machine()]), fd, b"", 0)
    return ctypes.get_errno() if done else 0
