#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The udev rules: disks are scanned and get links; inner devices are not scanned and get none."""

import glob
import json
import os
import shutil
import subprocess
import tempfile

from obdtest import image, udevd
from obdtest.files import read, work_directory, write
from obdtest.ktap import Skip, check, defer, equal, main, test
from obdtest.left import devices
from obdtest.programs import close, quietly, run

RULES = "/run/udev/rules.d"
# The file names of device-mapper's rules in Debian, and in other distributions.
UPSTREAM = {"55-dm.rules": "10-dm.rules", "56-lvm.rules": "11-dm-lvm.rules",
            "60-persistent-storage-dm.rules": "13-dm-disk.rules"}
UUID, LABEL = "0b2f3c4d-1111-4222-8333-444455556666", "obdtest-fs"
NAME = f"obdtest-{os.getpid()}"


def remove(name):
    quietly("dmsetup", "remove", "--retry", name)


def make_layers():
    """Makes the files of a stack, an ext4 file system and a change, with lengths that are not multiples of 512.
    Programs that scan the decompressed first layer take it for swap space: the unused part of its header has swap's
    header."""
    work = work_directory()
    os.mkdir(f"{work}/tree")
    with open(f"{work}/tree/file", "w", encoding="ascii") as file:
        file.write("content\n" * 1000)
    run("truncate", "--size=8M", f"{work}/disk")
    run("mkfs.ext4", "-q", "-U", UUID, "-L", LABEL, "-d", f"{work}/tree", f"{work}/disk")
    run("truncate", "--size=1M", f"{work}/swap")
    run("mkswap", f"{work}/swap")
    run("obdsetup", "create", "--algorithm", "none", "--image", f"{work}/disk", f"{work}/bare")
    bare, swap = read(f"{work}/bare"), read(f"{work}/swap")
    # The first page is that of the swap space, except for the first 1024 bytes.
    crafted = bare[:1024] + swap[1024:4096] + bare[4096:]
    layers = []
    for name, layer in (("base", crafted), ("top", image.lsmt(8 << 20, [(16000, 8)]))):
        raw = next(raw for block in (4096, 8192, 16384) if len(raw := image.zfile(layer, image.ZSTD, block)) % 512)
        layers.append(write(f"{work}/{name}.obd", raw))
    return layers


def open_stack():
    """Opens a stack. obdsetup returns when udev has processed its devices."""
    layers = make_layers()
    equal(run("obdsetup", "open", NAME, *layers), f"/dev/mapper/{NAME}\n", "open")
    defer(close, NAME)


def names():
    return set(run("dmsetup", "info", "-c", "--noheadings", "-o", "name").split())


def inner():
    """Returns the names and UUIDs of the devices below the disk, by (kind, layer's file)."""
    return {(name.split("-")[-1], name.split(".")[0]): (name, uuid) for name, uuid in devices().items()
            if uuid.startswith(("OVERLAYBD-LAYER-", "OVERLAYBD-BLOB-"))}


def look(what):
    """Checks udev's properties of the stack's devices, and its links to them."""
    top = f"/dev/mapper/{NAME}"
    has = udevd.properties(top)
    equal(has.get("ID_FS_TYPE"), "ext4", f"{what}: type of the file system")
    equal(has.get("DM_UUID"), f"OVERLAYBD-LSMT-{NAME}", f"{what}: UUID of the device")
    check(has.get("SYSTEMD_READY") != "0", f"{what}: to systemd, the disk isn't ready")
    wanted = {f"mapper/{NAME}", f"disk/by-id/dm-name-{NAME}", f"disk/by-id/dm-uuid-OVERLAYBD-LSMT-{NAME}",
              f"disk/by-uuid/{UUID}", f"disk/by-label/{LABEL}"}
    check(wanted <= udevd.links(top), f"{what}: links {udevd.links(top)}")
    for link in wanted:
        equal(os.path.realpath(f"/dev/{link}"), os.path.realpath(top), f"{what}: {link}")
    below = inner()
    equal(sorted(below), [(kind, layer) for kind in ("blob", "zfile") for layer in ("base", "top")], f"{what}: devices")
    for name, _ in below.values():
        hidden(name, what)


def hidden(name, what):
    has = udevd.properties(f"/dev/mapper/{name}")
    scanned = [key for key in has if key.startswith(("ID_FS", "ID_PART", "LVM"))]
    check(not scanned, f"{what}: {name} was scanned: {scanned}")
    equal(udevd.links(f"/dev/mapper/{name}"), {f"mapper/{name}"}, f"{what}: links to {name}")
    equal(has.get("SYSTEMD_READY"), "0", f"{what}: systemd's view of {name}")
    for part in ("SUBSYSTEM", "DISK", "OTHER"):
        equal(has.get(f"DM_UDEV_DISABLE_{part}_RULES_FLAG"), "1", f"{what}: flag {part} of {name}")


def trigger(action):
    run("udevadm", "trigger", f"--action={action}", "--subsystem-match=block")
    udevd.settle()


@test("udevadm verify finds no mistake in the rules")
def verify():
    files = glob.glob(f"{RULES}/*overlaybd.rules")
    equal(sorted(map(os.path.basename, files)), ["11-dm-overlaybd.rules", "56-dm-overlaybd.rules"], "files")
    run("udevadm", "verify", *files)


@test("the decompressed layer that the next tests use looks like swap space")
def crafted():
    layer = make_layers()[0]
    plain = tempfile.NamedTemporaryFile(prefix="obdtest-")
    with open(layer, "rb") as file:
        plain.write(image.Zfile(file.read()).read())
    plain.flush()
    equal(run("blkid", "--probe", "--output", "value", "--match-tag", "TYPE", plain.name).strip(), "swap", "blkid")


@test("a disk is scanned and gets links, inner devices don't, not after later events, either")
def stack():
    open_stack()
    look("when open is over")
    trigger("change")
    look("after a change event")
    trigger("add")
    look("after an add event, as at boot")
    run("obdsetup", "close", NAME)
    check(not os.path.lexists(f"/dev/disk/by-uuid/{UUID}"), "a link by UUID is left")
    left = glob.glob(f"/dev/mapper/{NAME}*") + glob.glob(f"/dev/disk/*/*{NAME}*") + glob.glob("/dev/mapper/*.obd-*")
    equal(left, [], "links that are left")


@test("the same if device-mapper's rules have the numbers of other distributions than Debian")
def upstream():
    for name, other in UPSTREAM.items():
        if not os.path.exists(f"/usr/lib/udev/rules.d/{name}"):
            raise Skip(f"no {name}: this is no Debian")
        shutil.copy(f"/usr/lib/udev/rules.d/{name}", f"{RULES}/{other}")
        os.symlink("/dev/null", f"{RULES}/{name}")
    defer(run, "udevadm", "control", "--reload")
    for name, other in UPSTREAM.items():
        defer(os.unlink, f"{RULES}/{name}")
        defer(os.unlink, f"{RULES}/{other}")
    run("udevadm", "control", "--reload")
    open_stack()
    look("when open is over")
    trigger("change")
    look("after a change event")
    run("obdsetup", "close", NAME)


@test("devices made by dmsetup: the UUID determines whether a device is hidden, not the name")
def by_hand():
    open_stack()
    sectors = 8 << 11
    table = f"0 {sectors} linear /dev/mapper/{NAME} 0"
    shown, hide = {}, {}
    for kind, uuid in (("lsmt", "OVERLAYBD-LSMT-x-zfile0"), ("zfile", "OVERLAYBD-ZFILE-x-0"), ("none", ""),
                       ("layer", "OVERLAYBD-LAYER-x"), ("blob", "OVERLAYBD-BLOB-x")):
        # Names that obdsetup gives to inner devices.
        name = f"{NAME}-{kind}-zfile0" if kind in ("lsmt", "zfile", "none") else f"{NAME}-{kind}"
        run("dmsetup", "create", name, "--readonly", *(["--uuid", uuid] if uuid else []), "--table", table)
        defer(remove, name)
        (shown if kind in ("lsmt", "zfile", "none") else hide)[name] = uuid
    for name, uuid in shown.items():
        has = udevd.properties(f"/dev/mapper/{name}")
        equal(has.get("ID_FS_TYPE"), "ext4", f"type of the file system on {name}")
        links = udevd.links(f"/dev/mapper/{name}")
        check(f"disk/by-id/dm-name-{name}" in links, f"{name}: links {links}")
        check(not uuid or f"disk/by-id/dm-uuid-{uuid}" in links, f"{name}: links {links}")
    for name in hide:
        hidden(name, "made by dmsetup")


@test("lsblk, dmsetup ls and dmsetup info show the devices of a stack correctly")
def shown():
    open_stack()
    seen, parents = {}, {}

    def walk(nodes, parent):
        for node in nodes:
            seen[node["name"]] = node
            parents.setdefault(node["name"], set()).add(parent)
            walk(node.get("children", []), node["name"])

    walk(json.loads(run("lsblk", "--json", "-o", "NAME,TYPE,RO,FSTYPE,UUID,LABEL"))["blockdevices"], None)
    equal([seen[NAME][key] for key in ("type", "ro", "fstype", "uuid", "label")],
          ["overlaybd", True, "ext4", UUID, LABEL], "lsblk: the disk")
    below = inner()
    zfiles, blobs = [[below[kind, layer][0] for layer in ("base", "top")] for kind in ("zfile", "blob")]
    equal(parents[NAME], set(zfiles), "lsblk: below the disk")
    for zfile_name, blob in zip(zfiles, blobs):
        equal(parents[zfile_name], {blob}, "lsblk: below a layer")
        loops = parents[blob]
        equal([(seen[loop]["type"], seen[loop]["ro"]) for loop in sorted(loops)], [("loop", True)] * 2,
              "lsblk: below a blob")
    for name in zfiles + blobs:
        equal([seen[name][key] for key in ("type", "ro", "fstype", "uuid", "label")],
              ["overlaybd", True, None, None, None], f"lsblk: {name}")
    rows = [row.split("|") for row in run("dmsetup", "info", "-c", "--noheadings", "--separator", "|", "-o",
                                          "name,attr,open,segments,uuid").splitlines()]
    table = {row[0]: row[1:] for row in rows}
    equal(table, {NAME: ["L--r", "0", "1", f"OVERLAYBD-LSMT-{NAME}"],
                  **{name: ["L--r", "1", "1" if kind == "zfile" else "2", uuid]
                     for (kind, _), (name, uuid) in below.items()}},
          "dmsetup info -c")
    tree = run("dmsetup", "ls", "--tree", "-o", "ascii,notrunc").splitlines()
    depth = {row.strip(" |-`").split(" ")[0]: len(row) - len(row.lstrip(" |-`")) for row in tree if "(7:" not in row}
    check(depth[NAME] < depth[zfiles[0]] < depth[blobs[0]], f"dmsetup ls --tree: {tree}")
    equal(set(depth), names(), "dmsetup ls --tree: names")


@test("the disk of open --zfile gets links, too")
def zfile():
    work = work_directory()
    run("truncate", "--size=8M", f"{work}/disk")
    run("mkfs.ext4", "-q", "-U", UUID, "-L", LABEL, f"{work}/disk")
    write(f"{work}/disk.zf", image.zfile(read(f"{work}/disk"), image.ZSTD, 65536))
    # The name ends with a number, as UUIDs of inner devices do.
    name = f"{NAME}-1"
    run("obdsetup", "open", "--zfile", name, f"{work}/disk.zf")
    defer(close, name)
    check({f"disk/by-uuid/{UUID}", f"disk/by-id/dm-uuid-OVERLAYBD-ZFILE-{name}"} <=
          udevd.links(f"/dev/mapper/{name}"), f"links: {udevd.links(f'/dev/mapper/{name}')}")
    run("obdsetup", "status", name)
    run("obdsetup", "close", name)


@test("open and close while udev is busy", timeout=400)
def busy():
    layers = make_layers()
    for nth in range(4):
        subprocess.run(["udevadm", "trigger", "--subsystem-match=block"], check=True)
        run("obdsetup", "open", NAME, *layers)
        defer(close, NAME)
        check(os.path.islink(f"/dev/disk/by-uuid/{UUID}"), f"round {nth}: no link when open is over")
        subprocess.run(["udevadm", "trigger", "--action=add", "--subsystem-match=block"], check=True)
        run("obdsetup", "close", NAME)
        equal((NAME in names(), inner()), (False, {}), f"round {nth}: devices left")
    udevd.settle()


if __name__ == "__main__":
    udevd.start()
    main()
