#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Measures how long obdsetup takes to open and close stacks, with and without udevd, and veritysetup with one device.

 RUN='tests/bench/opens.py [NAME=PROGRAM]... [LAYERS]...' scripts/vm.sh

PROGRAM is an obdsetup; by default, the one in PATH. LAYERS is a number of layers; by default, 1 16 64 255. Each
figure is the median of OBD_ROUNDS rounds (3), in seconds. No layer's file is a whole number of sectors, so each layer
needs two loop devices, one of them for the bytes after the last whole sector, a linear device that joins them, and a
zfile device.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
# pylint: disable=wrong-import-position
from obdtest import image, udevd

ROUNDS = int(os.environ.get("OBD_ROUNDS", "3"))
SIZE = 1 << 20
NAME = "obdbench"


def run(*args):
    """Runs a program. Returns how long it took, in seconds."""
    start = time.monotonic()
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    took = time.monotonic() - start
    if done.returncode:
        sys.exit(f"{' '.join(args[:3])}: status {done.returncode}: {done.stderr.strip()}")
    return took


def make_layers(work, count):
    data = image.sample(SIZE, 7)
    paths = []
    for nth in range(count):
        layer = image.lsmt(SIZE, [(0, data)] if nth == 0 else [(nth * 8 % 2000, data[nth * 4096 % 262144:][:4096])])
        paths.append(f"{work}/layer{nth}.obd")
        raw = next(raw for block in (4096, 8192, 16384) if len(raw := image.zfile(layer, image.LZ4, block)) % 512)
        with open(paths[-1], "wb") as file:
            file.write(raw)
    return paths


def measure(up, down):
    """Returns the median times of two commands that run in turn."""
    times = [(run(*up), run(*down)) for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*times)]


def rows(programs, layers, counts, verity):
    for count in counts:
        row = f"{count:>6}"
        for program in programs.values():
            took = measure([program, "open", NAME, *layers[:count]], [program, "close", NAME])
            row += "".join(f" {seconds:>12.2f}" for seconds in took)
        print(row, flush=True)
    if verity:
        data, tree, root = verity
        took = measure(["veritysetup", "open", data, NAME, tree, root], ["veritysetup", "close", NAME])
        print("verity" + "".join(f" {seconds:>12.2f}" for seconds in took), flush=True)


def make_verity(work):
    """Makes a dm-verity device's data and hash tree. Returns them with the root hash; None without veritysetup."""
    if not shutil.which("veritysetup"):
        return None
    data, tree = f"{work}/verity.data", f"{work}/verity.tree"
    with open(data, "wb") as file:
        file.write(image.sample(SIZE, 7))
    out = subprocess.run(["veritysetup", "format", data, tree], capture_output=True, text=True, check=True).stdout
    root = next(line.split()[-1] for line in out.splitlines() if line.startswith("Root hash"))
    subprocess.run(["modprobe", "dm-verity"], check=False)
    return data, tree, root


def main():
    programs = dict(arg.split("=", 1) for arg in sys.argv[1:] if "=" in arg) or {"obdsetup": "obdsetup"}
    counts = [int(arg) for arg in sys.argv[1:] if arg.isdigit()] or [1, 16, 64, 255]
    with tempfile.TemporaryDirectory() as work:
        layers = make_layers(work, max(counts))
        verity = make_verity(work)
        head = "layers" + "".join(f" {name + ' ' + what:>12}" for name in programs for what in ("open", "close"))
        print(f"without udevd\n{head}")
        rows(programs, layers, counts, verity)
        udevd.start()
        print(f"with udevd\n{head}")
        rows(programs, layers, counts, verity)


if __name__ == "__main__":
    main()
