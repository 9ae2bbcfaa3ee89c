#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What obdsetup status and list report to operators and monitoring: health, exit codes, file names."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

from obdtest import dm, image
from obdtest.disk import Disk, read_or_none
from obdtest.files import work_directory, write
from obdtest.ktap import check, defer, equal, main, test
from obdtest.programs import OBDSETUP, close, obdsetup, quietly, run

SIZE = 256 << 10
DATA = image.sample(SIZE, 61)
RAWS = [image.zfile(image.lsmt(SIZE, [(0, DATA[:400 * 512])])), image.zfile(image.lsmt(SIZE, [(8, DATA[:4096])]))]
NAME = f"obdtest-{os.getpid()}"
NOBODY = 65534


def remove(name):
    quietly("dmsetup", "remove", name)


def open_stack(name=NAME, raws=tuple(RAWS)):
    """Opens a stack of files. Returns their names, lowest first."""
    work = work_directory()
    layers = [write(f"{work}/layer{nth}.obd", raw) for nth, raw in enumerate(raws)]
    obdsetup("open", name, *layers)
    defer(close, name)
    return layers


def corrupt(path, block):
    """Changes a byte of a block of RAWS[0] in a file."""
    offset, length = image.Zfile(RAWS[0]).places()[block]
    with open(path, "r+b") as file:
        file.seek(offset + length // 2)
        byte = file.read(1)[0]
        file.seek(offset + length // 2)
        file.write(bytes([byte ^ 0x40]))


def report(status=0, name=NAME):
    return json.loads(obdsetup("status", "--json", name, status=status)[0])


@test("a healthy stack: status begins with the health and has a few lines; --verbose adds the counters")
def healthy():
    layers = open_stack()
    text = obdsetup("status", NAME)[0].splitlines()
    equal(text[0], "health: ok", "first line")
    equal(text[1], f"/dev/mapper/{NAME}: {SIZE} bytes (256.00 KiB), 2 layers, not in use", "second line")
    equal([line.split() for line in text[2:]], [[str(nth), "ok", path] for nth, path in enumerate(layers)], "layers")
    verbose = obdsetup("status", "--verbose", NAME)[0]
    fields = ["state", "algorithm", "block size", "blocks", "table memory", "reads", "read bytes",
              "decompressed blocks", "read errors", "corrupt blocks", "cached blocks", "cache hits"]
    part = verbose.split(f"/dev/mapper/{report()['layers'][0]['zfile']}:")[1]
    places = [part.index(f"  {field:<20} ") for field in fields]
    equal(places, sorted(places), "places of the counters")
    found = report()
    equal((found["health"], found["corrupt_blocks"], found["read_errors"]), ("ok", 0, 0), "sums")
    equal([layer["file"] for layer in found["layers"]], layers, "files")
    rows = json.loads(obdsetup("list", "--json", "--check")[0])
    equal([(row["name"], row["size"], row["layers"], row["health"]) for row in rows], [(NAME, SIZE, 2, "ok")], "list")
    table = obdsetup("list")[0].splitlines()
    equal(table[1].split(), [NAME, "256.00", "KiB", "2", "ok", "-", "-", "-"], "list")
    disk = Disk(f"/dev/mapper/{NAME}")
    equal(obdsetup("status", NAME)[0].splitlines()[1].split(", ")[2], "in use", "use of an open disk")
    disk.close()


@test("the manual page has all names in the JSON of status and list")
def documented():
    def keys(value):
        if isinstance(value, dict):
            return {*value, *(key for below in value.values() for key in keys(below))}
        return {key for below in value for key in keys(below)} if isinstance(value, list) else set()

    path = os.path.join(os.path.dirname(__file__), "../Documentation/obdsetup.8")
    with open(path, encoding="utf-8") as file:
        section = file.read().split(".Sh JSON")[1].split("\n.Sh ")[0]
    open_stack()
    found = report()
    # The fields of a target's status are documented with the target.
    for device in found["devices"]:
        for target in device["targets"]:
            target["status"] = {}
    names = keys(found) | keys(json.loads(obdsetup("list", "--json")[0]))
    check(len(names) >= 20, f"names: {names}")
    equal(names - set(re.findall(r"\w+", section)), set(), "names that are missing")


@test("64 layers: one line for each")
def many_layers():
    open_stack(raws=RAWS * 32)
    text = obdsetup("status", NAME)[0].splitlines()
    equal(len(text), 66, "lines")
    equal(json.loads(obdsetup("list", "--json")[0])[0]["layers"], 64, "layers")


@test("a corrupt block: exit code 3, and the name of its file")
def corrupt_block():
    layers = open_stack()
    corrupt(layers[0], 20)
    # The block hasn't been read yet.
    obdsetup("status", NAME)
    disk = Disk(f"/dev/mapper/{NAME}")
    for _ in range(2):
        for at in range(4096 * 15, 4096 * 22, 4096):
            read_or_none(disk, at, 4096)
    disk.close()
    out, err = obdsetup("status", NAME, status=3)
    first = out.splitlines()[0]
    check(first.startswith(f"health: CORRUPT: a corrupt block of {layers[0]} was read "), first)
    check(err.startswith(f"obdsetup: {NAME}: CORRUPT: "), err)
    equal(out.splitlines()[2].split(), ["0", "CORRUPT", layers[0]], "the layer")
    equal(out.splitlines()[3].split(), ["1", "ok", layers[1]], "the other layer")
    found = report(3)
    equal((found["health"], found["layers"][0]["health"], found["layers"][1]["health"]),
          ("corrupt", "corrupt", "ok"), "health")
    check(found["corrupt_blocks"] >= 1 and found["read_errors"] == 0, f"sums: {found}")
    obdsetup("list")
    err = obdsetup("list", "--check", status=3)[1]
    check(err.startswith(f"obdsetup: {NAME}: CORRUPT: ") and layers[0] in err, err)
    out = obdsetup("verify", layers[0], status=3)[0]
    check("1 of " in out, f"verify, which the message names: {out!r}")


@test("a layer that is cut short: exit code 4 before a read, and read errors after one")
def cut_layer():
    layers = open_stack()
    os.truncate(layers[1], 1000)
    first = obdsetup("status", NAME, status=4)[0].splitlines()[0]
    check(first.startswith(f"health: CUT SHORT: {layers[1]} has 1000 bytes now, and had "), first)
    equal([layer["health"] for layer in report(4)["layers"]], ["ok", "cut"], "layers")
    os.truncate(layers[1], 0)
    disk = Disk(f"/dev/mapper/{NAME}")
    equal(read_or_none(disk, 4096, 4096), None, "read")
    disk.close()
    with open(layers[1], "wb") as file:
        file.write(RAWS[1])
    found = report(4)
    equal(found["health"], "read-errors", "health when the file is back")
    check(found["read_errors"] > 0 and found["layers"][0]["read_errors"] == 0, f"sums: {found}")
    check(found["message"].startswith(f"READ ERRORS: a read of {layers[1]} failed"), found["message"])
    obdsetup("list", "--check", status=4)


@test("read errors of a layer without a zfile device: exit code 4")
def plain_layer():
    raw = image.lsmt(SIZE, [(0, DATA[:400 * 512])])
    layers = open_stack(raws=[raw])
    os.truncate(layers[0], 4096)
    disk = Disk(f"/dev/mapper/{NAME}")
    equal(read_or_none(disk, 100 * 1024, 4096), None, "read")
    disk.close()
    equal(report(4)["health"], "cut", "health")
    with open(layers[0], "wb") as file:
        file.write(raw)
    found = report(4)
    equal(found["health"], "read-errors", "health when the file is back")
    check(found["read_errors"] > 0, f"sums: {found}")
    check(found["message"].startswith("READ ERRORS: a read of the disk failed"), found["message"])
    obdsetup("list", "--check", status=4)


@test("a half-built stack: exit code 4, and the command that clears it")
def half_built():
    def made(name, uuid):
        run("dmsetup", "create", name, "--notable", "--uuid", uuid)
        defer(remove, name)

    for devices in ([("zfile0", "LAYER", "-0")], [("blob3", "BLOB", "-3"), ("zfile0", "LAYER", "-0")],
                    [("", "LSMT", "")]):
        for suffix, kind, number in devices:
            made(f"{NAME}-{suffix}" if suffix else NAME, f"OVERLAYBD-{kind}-{NAME}{number}")
        first = obdsetup("status", NAME, status=4)[0].splitlines()[0]
        check(first.startswith("health: HALF BUILT: ") and f"`obdsetup close {NAME}'" in first, first)
        equal(report(4)["health"], "half-built", "health")
        check("HALF BUILT" in obdsetup("list", "--check", status=4)[0], "list does not report it")
        obdsetup("close", NAME)
        err = obdsetup("status", NAME, status=4)[1]
        equal(err, f"obdsetup: no stack {NAME} is set up; `obdsetup list' shows those that are\n", "afterwards")


@test("a suspended stack: exit code 4, and the command that resumes it")
def suspended():
    open_stack()
    for device in (NAME, report()["layers"][1]["zfile"]):
        run("dmsetup", "suspend", device)
        try:
            first = obdsetup("status", NAME, status=4)[0].splitlines()[0]
        finally:
            run("dmsetup", "resume", device)
        equal(first, f"health: SUSPENDED: reads wait until `dmsetup resume {device}'", "first line")
    obdsetup("status", NAME)


@test("a renamed device: found by either name")
def renamed():
    open_stack()
    run("dmsetup", "rename", NAME, f"{NAME}-new")
    try:
        for name in (NAME, f"{NAME}-new"):
            text = obdsetup("status", name)[0].splitlines()
            equal(text[1], f"note: was renamed: it was opened as {NAME}", "note")
            check(text[2].startswith(f"/dev/mapper/{NAME}-new: "), text[2])
    finally:
        run("dmsetup", "rename", f"{NAME}-new", NAME)


@test("devices that stacks share, and devices of other programs")
def others():
    layers = open_stack()
    other = f"{NAME}b"
    obdsetup("open", other, layers[0])
    defer(close, other)
    rows = {row["name"]: row for row in json.loads(obdsetup("list", "--json")[0])}
    equal({name: row["shared_with"] for name, row in rows.items()}, {NAME: [other], other: [NAME]}, "shared with")
    foreign = dm.create(dm.line(0, 8, "zero"))
    for command in ("status", "close"):
        err = obdsetup(command, foreign.name, status=4)[1]
        check(f"device {foreign.name} was not set up by obdsetup: it has no UUID" in err, err)
    check(foreign.name not in obdsetup("list")[0], "list shows the other program's device")


def snippets():
    """Returns the programs in Documentation/monitoring.rst, by the file name that their comment begins with."""
    path = os.path.join(os.path.dirname(__file__), "../Documentation/monitoring.rst")
    with open(path, encoding="utf-8") as file:
        blocks = file.read().split(".. code:: python\n\n")[1:]
    found = {}
    for block in blocks:
        lines = itertools.takewhile(lambda line: not line or line.startswith("  "), block.split("\n"))
        text = textwrap.dedent("\n".join(lines))
        found[re.search(r"^# ([^ :]*)", text, re.MULTILINE)[1].split("/")[-1]] = text
    return found


@test("the programs in monitoring.rst")
def monitors():
    programs = snippets()
    equal(set(programs), {"obdsetup-verify-all", "obdsetup-textfile"}, "programs")
    layers = open_stack()
    work = os.path.dirname(layers[0])

    def example(name, *args):
        return subprocess.run([sys.executable, "-c", programs[name], *args], capture_output=True, text=True, check=False)

    def metrics():
        equal(example("obdsetup-textfile", work).returncode, 0, "exit status of obdsetup-textfile")
        with open(f"{work}/overlaybd.prom", encoding="utf-8") as file:
            return dict(line.rsplit(" ", 1) for line in file.read().splitlines())

    equal(metrics(), {f'overlaybd_{name}{{stack="{NAME}"}}': value for name, value in
                      {"healthy": "1", "corrupt_blocks_total": "0", "read_errors_total": "0", "layers": "2"}.items()},
          "metrics")
    equal(example("obdsetup-verify-all").returncode, 0, "verify")
    corrupt(layers[0], 20)
    done = example("obdsetup-verify-all")
    equal(done.returncode, 1, f"verify of a corrupt file ({done.stderr})")
    check(layers[0] in done.stderr, done.stderr)
    disk = Disk(f"/dev/mapper/{NAME}")
    for at in range(4096 * 15, 4096 * 22, 4096):
        read_or_none(disk, at, 4096)
    disk.close()
    equal(metrics()[f'overlaybd_healthy{{stack="{NAME}"}}'], "0", "healthy")


@test("list without stacks, and list and status as an ordinary user")
def without():
    out, err = obdsetup("list")
    equal((out, err), ("", "obdsetup: no stack is set up\n"), "no stack")
    equal(obdsetup("list", "--json")[0], "[]\n", "no stack")
    # A directory that ordinary users can access.
    work = work_directory()
    os.chmod(work, 0o755)
    program = shutil.copy(OBDSETUP, work)
    os.chmod(program, 0o755)

    def as_nobody(*args):
        return subprocess.run([program, *args], capture_output=True, text=True, check=False, user=NOBODY)

    equal(as_nobody("list").returncode, 0, "list without stacks")
    layers = open_stack()
    done = as_nobody("list")
    equal(done.returncode, 2, "list")
    equal(done.stdout.splitlines()[1].split(), [NAME, "256.00", "KiB", "-", "unknown", "-", "-", "-"], "list")
    check("must be root" in done.stderr, done.stderr)
    for args in (["status", NAME], ["close", NAME], ["open", "x", *layers]):
        os.chmod(os.path.dirname(layers[0]), 0o755)
        done = as_nobody(*args)
        equal(done.returncode, 2, args[0])
        check("must be root" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr)


if __name__ == "__main__":
    main()
