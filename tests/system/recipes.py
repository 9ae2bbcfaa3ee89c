#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The recipes of Documentation/recipes.rst: the commands are read from the document and run unchanged."""

import glob
import json
import os
import signal
import subprocess
import time

from obdtest import dm
from obdtest.disk import Disk, read_or_none
from obdtest.files import read
from obdtest.ktap import Failure, Skip, check, defer, equal, main, note, same_bytes, test
from obdtest.memory import page_cache
from obdtest.programs import need, need_module, quietly
from obdtest.recipes import APP, DATA, PIECE, SIZE, Work, main_in_vm, nothing_left, recipe, sh, target_status, whole


@test("dm-verity below: the disk is correct; reads of a changed block fail with EIO, others are correct")
def verity_below():
    need("veritysetup")
    need_module("dm-verity")
    work = Work()
    form, use, down = recipe("An image trusted by one hash for each layer")
    sh(form)
    sh(use)
    work.same()
    work.corrupt()
    right, failed = work.pieces()
    check(right and failed, f"{right} pieces right, {failed} with EIO")
    layers = json.loads(sh("obdsetup status --json app || :"))["layers"]
    equal(target_status(layers[0]["zfile"])[3], "V", "state of zfile")
    equal(target_status("base-verified")[3], "C", "state of verity")
    equal(target_status("app-verified")[3], "V", "state of the other verity")
    sh(down)
    nothing_left()
    # Without verity, the changed bytes are read, and no read fails.
    sh("obdsetup open app base.obd app.obd")
    check(whole("app") != work.disk, "without verity, the disk doesn't have the changed bytes")
    sh("obdsetup close app")


@test("dm-verity above: the disk is correct; reads of a changed block fail with EIO, others are correct")
def verity_above():
    need("veritysetup")
    need_module("dm-verity")
    work = Work()
    form, use, down = recipe("An image trusted by one hash: dm-verity above")
    sh(form)
    sh(use)
    work.same("app-verified")
    work.corrupt()
    right, failed = work.pieces("app-verified")
    check(right and failed, f"{right} pieces right, {failed} with EIO")
    check(whole("app") != work.disk, "below verity, the disk doesn't have the changed bytes")
    equal(target_status("app-verified")[3], "C", "state of verity")
    sh(down)
    nothing_left()


def work_of_server():
    """Returns a Work whose layers are where the recipes' server has them, in /srv/images. `server' is a name of this
    machine."""
    work = Work()
    os.mkdir("images")
    for name in ("base", "app"):
        os.rename(f"{name}.obd", f"images/{name}.obd")
        sh(f"stat -c %s images/{name}.obd >{name}.size")
    if os.path.lexists("/srv/images"):
        raise Skip("there is a /srv/images")
    os.symlink(f"{work.path}/images", "/srv/images")
    defer(os.unlink, "/srv/images")
    host("server")
    return work


class NvmeTcp:
    """Prepares the recipe with NVMe over TCP: makes this machine the server with the layers' files."""

    TARGET = "/sys/kernel/config/nvmet"

    def __init__(self):
        need_module("nvmet", "nvmet-tcp", "nvme-tcp")
        if glob.glob("/dev/nvme[0-9]*"):
            raise Skip("there are NVMe devices")
        self.work = work_of_server()
        self.server, self.node, self.node_down, self.server_down = recipe("A remote image: NVMe over TCP")
        defer(self._down)

    def _down(self):
        """Removes what a failed test has left."""
        self.work.down()
        for path in glob.glob("/sys/class/nvme/nvme*/delete_controller"):
            quietly("sh", "-c", f"echo 1 >{path}")
        for path in (f"{self.TARGET}/ports/1/subsystems/images", ):
            if os.path.lexists(path):
                os.unlink(path)
        for path in (f"{self.TARGET}/ports/1", *glob.glob(f"{self.TARGET}/subsystems/images/namespaces/*"),
                     f"{self.TARGET}/subsystems/images"):
            if os.path.exists(path):
                os.rmdir(path)

    def lose(self):
        """Removes the export, so that the node loses its connection to the server."""
        os.unlink(f"{self.TARGET}/ports/1/subsystems/images")

    def come_back(self):
        os.symlink(f"{self.TARGET}/subsystems/images", f"{self.TARGET}/ports/1/subsystems/images")


@test("NVMe over TCP: reads fail with EIO a while after the server is lost, and work again when it is back")
def nvme_tcp():
    remote_ = NvmeTcp()
    work = remote_.work
    sh(remote_.server)
    sh(remote_.node)
    work.same()
    sh("umount /mnt; obdsetup close app; echo 3 >/proc/sys/vm/drop_caches")
    sh("\n".join(line for line in remote_.node.splitlines() if "/dev/nvme-fabrics" not in line))
    remote_.lose()
    disk = Disk("/dev/mapper/app")
    start = time.monotonic()
    check(None in (read_or_none(disk, at, PIECE) for at in range(0, SIZE, PIECE)), "no read ended with EIO")
    took = time.monotonic() - start
    note(f"the first read that failed ended within {took:.1f} s")
    disk.close()
    remote_.come_back()

    def is_back():
        disk = Disk("/dev/mapper/app")
        try:
            return read_or_none(disk, 0, PIECE) is not None and read_or_none(disk, SIZE // 2, PIECE) is not None
        finally:
            disk.close()

    wait(is_back, "the server is back")
    sh("echo 3 >/proc/sys/vm/drop_caches")
    work.same()
    sh(remote_.node_down)
    sh(remote_.server_down)
    nothing_left()


@test("overlayfs: containers of one image cache its files once")
def several_times():
    need_module("overlay")
    Work()
    use, down = recipe("One image several times")
    for name in ("c1", "c2"):
        defer(quietly, "umount", f"/run/{name}", f"/run/{name}.rw")
    sh(use)
    sh("echo 3 >/proc/sys/vm/drop_caches")
    same_bytes(read("/run/c1/data"), DATA, "content in the first")
    before = page_cache()
    same_bytes(read("/run/c2/data"), DATA, "content in the second")
    check(page_cache() - before < len(DATA) >> 12, f"the second read took {page_cache() - before} KiB of page cache")
    with open("/run/c1/data", "ab") as file:
        file.write(b"more")
    same_bytes(read("/run/c1/data"), DATA + b"more", "file that the first has changed")
    same_bytes(read("/run/c2/data"), DATA, "the same file in the second")
    sh(down)
    nothing_left()


@test("open --writable: six commands make a third layer of changes")
def third_layer():
    need_module("dm-snapshot")
    Work()
    os.mkdir("new")
    for name, more in (("new/more", APP[:70000]), ("new/text", b"another")):
        with open(name, "wb") as file:
            file.write(more)
    make, use, down = recipe("A new layer of what is written")
    equal(len([line for line in make.splitlines() if line.strip()]), 6, "commands")
    sh(make)
    nothing_left()
    sh(use)
    same_bytes(read("/mnt/data") + read("/mnt/app"), DATA + APP, "old files")
    same_bytes(read("/mnt/more") + read("/mnt/text"), APP[:70000] + b"another", "new files")
    sh(down)
    nothing_left()
    # The layer equals the one that `create' makes by comparing the whole disk.
    sh("""obdsetup open --writable new.changes work base.obd app.obd
        obdsetup create --base base.obd --base app.obd --image /dev/mapper/work --tar slow.tar
        obdsetup close work""")
    same_bytes(read("new.tar"), read("slow.tar"), "the layer")


@test("erofs with inode_share: the common files of two images are cached once")
def one_page_cache():
    need_module("erofs")
    Work()
    for name in ("one", "two"):
        os.mkdir(name)
        for path, what in (("data", DATA), ("own", name.encode() * 20000)):
            with open(f"{name}/{path}", "wb") as file:
                file.write(what)
    make, use, down = recipe("Images with files in common")
    sh(make)
    defer(quietly, "umount", "/mnt2")
    try:
        sh(use)
    except Failure as error:
        if "inode_share" in str(error) and tuple(map(int, os.uname().release.split(".")[:2])) < (7, 0):
            raise Skip("the kernel is older than inode_share") from error
        raise
    sh("echo 3 >/proc/sys/vm/drop_caches")
    same_bytes(read("/mnt/data"), DATA, "content in the first")
    before = page_cache()
    same_bytes(read("/mnt2/data"), DATA, "content in the second")
    check(page_cache() - before < len(DATA) >> 12, f"the second read took {page_cache() - before} KiB of page cache")
    same_bytes(read("/mnt2/own"), b"two" * 20000, "file that only the second has")
    sh(down)
    nothing_left()


def processes(name):
    """Returns the IDs of the processes with this name."""
    found = []
    for path in glob.glob("/proc/[0-9]*/comm"):
        try:
            with open(path, encoding="ascii") as file:
                if file.read().strip() == name:
                    found.append(int(path.split("/")[2]))
        except OSError:
            pass
    return found


def kill(name, number=signal.SIGKILL):
    for pid in processes(name):
        os.kill(pid, number)


def wait(condition, what, seconds=60):
    for _ in range(seconds * 20):
        if condition():
            return
        time.sleep(0.05)
    check(False, f"{what}: not within {seconds} s")


def host(name):
    """Makes name another name of this machine until the end of the test."""
    with open("/etc/hosts", encoding="ascii") as file:
        before = file.read()
    with open("/etc/hosts", "w", encoding="ascii") as file:
        file.write(f"{before}127.0.0.1 {name}\n")

    def restore():
        with open("/etc/hosts", "w", encoding="ascii") as file:
            file.write(before)
    defer(restore)


class Remote:
    """Prepares the recipes with nbdkit: makes this machine the server with the layers' files, and an empty volume
    group."""

    def __init__(self):
        need("nbdkit", "nbd-client", "lvm")
        need_module("nbd", "dm-clone")
        self.work = work_of_server()
        disk = dm.Loop(b"", size=80 << 20, readonly=False)
        sh(f"vgcreate --quiet vg {disk.path}")
        defer(quietly, "vgremove", "--force", "vg")
        defer(self._down)
        self.blocks = recipe("A remote image")

    def _down(self):
        kill("nbdkit")
        self.work.down()
        for number in range(2):
            quietly("nbd-client", "-d", f"/dev/nbd{number}")

    def server(self, option="", parameter=""):
        sh(self.blocks[0].replace(" --readonly", f" --readonly {option}").rstrip() + f" {parameter}")

    def node(self):
        sh(self.blocks[1])


def hydrated(name):
    """Returns the number of local regions of a dm-clone device, and of all regions."""
    return tuple(map(int, target_status(name)[6].split("/")))


@test("nbdkit and dm-clone: the disk reads correctly before anything is local, and when the server has gone")
def remote():
    remotes = Remote()
    work = remotes.work
    remotes.server()
    remotes.node()
    equal(hydrated("base-local")[0] + hydrated("app-local")[0], 0, "local regions")
    work.same()
    equal(hydrated("base-local")[0] + hydrated("app-local")[0], 0, "local regions after reads")
    sh(remotes.blocks[2])
    for name in ("base-local", "app-local"):
        local, regions = hydrated(name)
        equal(local, regions, f"local regions of {name}")
    work.same()
    sh(remotes.blocks[3])
    kill("nbdkit")
    equal([line for line in sh("dmsetup deps -o devname").splitlines() if "nbd" in line], [], "users of NBD")
    sh("echo 3 >/proc/sys/vm/drop_caches")
    work.same()
    sh(remotes.blocks[4])
    work.same()
    sh("obdsetup close app")
    nothing_left()


@test("nbdkit and dm-clone: reads fail with EIO if the server hangs or dies; copied regions stay local")
def remote_dies():
    remotes = Remote()
    work = remotes.work
    # 4 Mbit/s, so that the copy can be stopped before all is local.
    remotes.server("--filter=rate", "rate=4M")
    remotes.node()
    work.same()
    sh("dmsetup message base-local 0 enable_hydration")
    wait(lambda: hydrated("base-local")[0], "something is local")
    sh("dmsetup message base-local 0 disable_hydration")
    before = hydrated("base-local")
    check(before[0] < before[1], f"local: {before}")
    kill("nbdkit", signal.SIGSTOP)
    disk = Disk("/dev/mapper/app")
    start = time.monotonic()
    check(None in (read_or_none(disk, at, PIECE) for at in range(0, SIZE, PIECE)), "no read ended with EIO")
    note(f"the read ended after {time.monotonic() - start:.1f} s")
    disk.close()
    kill("nbdkit")
    start = time.monotonic()
    right, failed = work.pieces()
    check(right and failed, f"{right} pieces right, {failed} with EIO")
    note(f"{right} pieces right, {failed} with EIO, in {time.monotonic() - start:.1f} s")
    sh("""
        umount /mnt
        obdsetup close app
        dmsetup remove base-local app-local
        nbd-client -d /dev/nbd0
        nbd-client -d /dev/nbd1""")
    nothing_left()
    # Make the dm-clone devices again with the same volumes: the copied regions are still local.
    remotes.server()
    sh("\n".join(line for line in remotes.blocks[1].splitlines() if "lvcreate" not in line))
    check(hydrated("base-local")[0] >= before[0], f"local: {hydrated('base-local')}, before {before}")
    work.same()
    sh("dmsetup message base-local 0 enable_hydration")
    wait(lambda: hydrated("base-local")[0] > before[0], "the copy continues")
    sh("umount /mnt; obdsetup close app; dmsetup remove base-local app-local")


@test("nbdkit and dm-cache: the device reads correctly, again and again")
def cached():
    need_module("dm-cache", "dm-cache-smq")
    remotes = Remote()
    remotes.server()
    up, down = recipe("Only what is used")
    sh(up)
    for _ in range(3):
        remotes.work.same_base()
    check(int(target_status("base-local")[7]) + int(target_status("base-local")[8]), "the cache has seen no reads")
    sh(down)
    nothing_left()


@test("nbdkit with its curl plugin: the device reads correctly from a web server")
def web():
    need("nbdkit", "nbd-client", "busybox")
    need_module("nbd")
    work = Work()
    host("server")
    sh("stat -c %s base.obd >base.size")
    server = subprocess.Popen(["busybox", "httpd", "-f", "-p", "127.0.0.1:8080", "-h", work.path])
    defer(server.wait)
    defer(server.kill)
    defer(kill, "nbdkit")
    up, down = recipe("From a web server")
    defer(quietly, "nbd-client", "-d", "/dev/nbd0")
    defer(quietly, "obdsetup", "close", "base")
    defer(quietly, "umount", "/mnt")
    sh(up)
    work.same_base()
    sh(down)
    wait(lambda: not processes("nbdkit"), "nbdkit ends")
    nothing_left()


def ublk_up():
    """Opens the layers from devices of rublk. Returns the Work, and the commands that take all down."""
    need("rublk")
    need_module("ublk_drv")
    work = Work()
    up, down = recipe("A layer from a process")
    defer(quietly, "rublk", "del", "--all")
    sh(up)
    work.same()
    return work, down


@test("ublk: the disk reads correctly")
def ublk():
    _, down = ublk_up()
    sh(down)
    equal(glob.glob("/dev/ublkb*"), [], "ublk devices that are left")
    nothing_left()


@test("ublk: reads fail with EIO if the server dies")
def ublk_dies():
    work, _ = ublk_up()
    kill("rublk")
    start = time.monotonic()
    right, failed = work.pieces()
    check(failed, f"{right} pieces right, {failed} with EIO")
    note(f"{right} pieces right, {failed} with EIO, in {time.monotonic() - start:.1f} s")
    sh("umount /mnt; obdsetup close app")
    nothing_left()


if __name__ == "__main__":
    main_in_vm(main)
