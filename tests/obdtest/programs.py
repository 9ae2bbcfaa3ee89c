# SPDX-License-Identifier: GPL-2.0
"""Runs obdsetup and other programs, checks that programs and kernel modules exist, and finds programs that still
run."""

import contextlib
import glob
import os
import shutil
import subprocess

from .ktap import Failure, Skip, equal

OBDSETUP = shutil.which("obdsetup")

_NAMES = (b"dmsetup", b"obdsetup", b"obdsetup-program", b"ipcrm")
# Commands of dmsetup that udev's rules run.
_OF_UDEV = (b"udevflags", b"udevcomplete")


def _run(command, options):
    if "input" not in options:
        options = {"stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, **options)


def run(*command, **options):
    """Runs a program, which must succeed. Returns its standard output. Does not count as a check of the test."""
    done = _run(command, options)
    if done.returncode:
        raise Failure(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def quietly(*command):
    """Runs a program that may fail. Returns its status."""
    return _run(command, {}).returncode


def obdsetup(*args, status=0, **options):
    """Runs obdsetup and checks its status. Returns its standard output and error."""
    need("obdsetup")
    done = _run([OBDSETUP, *args], options)
    said = (done.stdout + done.stderr).strip()
    equal(done.returncode, status, f"status of obdsetup {' '.join(args)} ({said})")
    return done.stdout, done.stderr


def close(name):
    """Closes a stack that a failed test has left open."""
    if OBDSETUP:
        quietly(OBDSETUP, "close", name)


def need(*names):
    """Skips the test unless these programs are installed."""
    for name in names:
        if not shutil.which(name):
            raise Skip(f"no {name}")


def need_module(*names, options=()):
    """Loads kernel modules, with options. Skips the test if that fails."""
    for name in names:
        if quietly("modprobe", name, *options):
            raise Skip(f"this kernel has no {name}")


def running():
    """Returns the command lines of the programs in _NAMES that run, without those that udev's rules run."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            with open(path, "rb") as file:
                words = file.read().split(b"\0")
            if os.path.basename(words[0]) in _NAMES and not set(_OF_UDEV) & set(words):
                found.append(b" ".join(words).decode())
    return found
