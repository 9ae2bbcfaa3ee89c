#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The recipes of Documentation/lvm.rst, with real udev and real LVM. The commands are read from the document."""

import atexit
import functools
import glob
import hashlib
import os
import re
import shutil
import subprocess
import tempfile

from obdtest import udevd
from obdtest.ktap import Failure, check, defer, equal, main, test

RECIPES = os.path.join(os.path.dirname(os.path.realpath(__file__)), "../../Documentation/lvm.rst")
LVM_LOCAL = "/etc/lvm/lvmlocal.conf"


def blocks():
    """Returns the literal blocks of the document, by the titles of their sections."""
    with open(RECIPES, encoding="utf-8") as file:
        lines = file.read().splitlines()
    found, title, literal = {}, None, False
    for line, below in zip(lines, lines[1:] + [""]):
        if line and re.fullmatch(r"=+|-+", below):
            title, literal = line, False
        elif literal and (not line or line.startswith("    ")):
            found[title][-1] += line + "\n"
        elif line.endswith("::"):
            found.setdefault(title, []).append("")
            literal = True
        elif line:
            literal = False
    return found


BLOCKS = blocks()


def script(text):
    """Runs commands, none of which may fail or warn. Returns their output."""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, check=False)
    said = f"{text.strip()}:\n{done.stdout}{done.stderr}"
    equal(done.returncode, 0, f"status of {said}")
    if "WARNING" in done.stdout + done.stderr:
        raise Failure(f"a warning: {said}")
    return done.stdout


def quiet(text):
    """Runs commands that may fail, to remove what a failed test has left."""
    subprocess.run(text, shell=True, capture_output=True, check=False)


class Recipe:
    """The blocks of a section. Blocks that the test has not run at its end are a failure."""

    def __init__(self, title):
        self.title, self.blocks = title, list(BLOCKS[title])
        defer(self.over)

    def step(self):
        return script(self.blocks.pop(0))

    def over(self):
        equal(len(self.blocks), 0, f"blocks of `{self.title}' that were not run")


def lvm_is_content():
    """Checks that LVM's commands succeed, without warnings and without output on standard error."""
    for command in ("vgchange --activate y vg", "pvs --all", "lvs --all", "vgs"):
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        equal((done.returncode, done.stderr), (0, ""), f"status and standard error of {command}")
        check("WARNING" not in done.stdout, f"{command} prints a warning: {done.stdout}")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def files(root):
    """Returns the SHA-256 of each file of a tree, by path."""
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                found[os.path.relpath(path, root)] = sha256(path)
    return found


def same_files(wanted, root="/mnt"):
    equal(files(root), wanted, f"files in {root}")
    check(wanted, "there are no files")


def state():
    """Returns the mapped devices, the loop devices, and whether /mnt is mounted. A recipe must restore them."""
    return (sorted(name for name in os.listdir("/sys/block") if name.startswith("dm-")),
            sorted(path.split("/")[3] for path in glob.glob("/sys/block/loop*/loop")),
            os.path.ismount("/mnt"))


def gone(before):
    udevd.settle()
    equal(state(), before, "devices and mounts, as before")


@functools.cache
def images():
    """Makes two layers. Returns their directory, the sums of the files on their disk, and the sum of the disk."""
    work = tempfile.mkdtemp(prefix="obdtest-")
    atexit.register(shutil.rmtree, work)
    # The second layer has the changes on the disk.
    script(f"""cd {work}
        obdsetup create --directory /usr/lib/udev/rules.d --fs ext4 --size 32m base.obd
        obdsetup export -o disk.raw base.obd
        mount -o loop disk.raw /mnt
        rm /mnt/60-block.rules
        seq 100000 >/mnt/numbers
        umount /mnt
        obdsetup create --base base.obd --image disk.raw --algorithm zstd --block-size 64k app.obd
        mount -o loop,ro disk.raw /mnt""")
    found = files("/mnt")
    script("umount /mnt")
    return work, found, sha256(f"{work}/disk.raw")


class Host:
    """Makes a volume group `vg', and changes to the directory of the layers until the end of the test."""

    def __init__(self):
        work, self.files, self.sum = images()
        here = os.getcwd()
        os.chdir(work)
        defer(os.chdir, here)
        udevd.settle()
        self.empty = state()
        defer(self._end)
        script("""truncate --size=200M pv.raw
            losetup --find pv.raw
            loop=$(losetup --noheadings --output NAME --associated pv.raw)
            vgcreate --quiet vg $loop""")
        udevd.settle()

    def open(self):
        """Opens the stack `app' on the files."""
        script("obdsetup open app base.obd app.obd")
        defer(quiet, "obdsetup close app")
        equal(sha256("/dev/mapper/app"), self.sum, "content of the stack")

    def _end(self):
        quiet("""umount /mnt
            vgchange --devicesfile vm.devices --activate n guest
            vgchange --activate n guest
            for name in work vm; do dmsetup remove --retry $name; done
            for name in app vm vm-image; do obdsetup close $name; done""")
        quiet(f"rm -rf {LVM_LOCAL} /etc/lvm/devices")
        script("""vgremove --quiet --yes vg
            losetup --detach $(losetup --noheadings --output NAME --associated pv.raw)
            rm pv.raw""")
        forget()
        gone(self.empty)


def forget():
    """Makes LVM forget volumes that no longer exist, by deleting its records of them in /run/lvm."""
    udevd.settle()
    for path in glob.glob("/run/lvm/*_online/*") + glob.glob("/run/lvm/hints"):
        os.unlink(path)


def write(text):
    with open("/mnt/new", "w", encoding="ascii") as file:
        file.write(text)


def after_boot(mount):
    """Takes all down, and sets it up again as after a boot. Checks that the file of write() is still there."""
    script("obdsetup close app; vgchange --activate n vg")
    script("vgchange --activate y vg; obdsetup open app base.obd app.obd")
    script(mount)
    with open("/mnt/new", encoding="ascii") as file:
        equal(file.read(), "first\n", "what was written before")


@test("layers on logical volumes")
def layers():
    host = Host()
    before = state()
    recipe = Recipe("Layers on logical volumes")
    recipe.step()
    udevd.settle()
    recipe.step()
    equal(sha256("/dev/mapper/app"), host.sum, "content")
    same_files(host.files)
    lvm_is_content()
    tree = script("lsblk --noheadings --list --inverse --output NAME,TYPE,RO /dev/mapper/app")
    kinds = sorted(row.split()[1:] for row in tree.splitlines() if not row.startswith(("loop", "app ")))
    equal(kinds, [["lvm", "1"]] * 2 + [["overlaybd", "1"]] * 2, f"type and read-only flag of the devices below: {tree}")
    recipe.step()
    script("vgchange --activate n vg")
    gone(before)


@test("a thin volume with the image as its origin")
def thin():
    host = Host()
    before = state()
    host.open()
    recipe = Recipe("A thin volume with the image as its origin")
    recipe.step()
    mount = recipe.blocks[0]
    recipe.step()
    same_files(host.files)
    lvm_is_content()
    write("first\n")
    defer(quiet, "rm -f work.xml new.obd slow.obd")
    recipe.step()
    # `create' makes the same layer of the whole disk.
    script("obdsetup create --image /dev/mapper/work --base base.obd --base app.obd slow.obd; cmp new.obd slow.obd")
    down = recipe.blocks[0]
    recipe.step()
    equal(sha256("/dev/mapper/app"), host.sum, "the image after writes")
    after_boot(mount)
    equal(float(script("lvs --noheadings --options data_percent vg/pool")) > 0, True, "use of the pool")
    script(f"umount /mnt; {down}")
    recipe.step()
    script("lvremove --yes vg/pool; obdsetup close app")
    gone(before)


@test("a snapshot with the image as its origin")
def snapshot():
    host = Host()
    before = state()
    host.open()
    recipe = Recipe("A snapshot with the image as its origin")
    mount = "\n".join(recipe.blocks[0].strip().splitlines()[1:])
    recipe.step()
    same_files(host.files)
    lvm_is_content()
    write("first\n")
    status = recipe.step()
    check(re.match(r"0 65536 snapshot \d+/65536 \d+\n", status), f"the status is not that of a snapshot: {status!r}")
    recipe.step()
    equal(sha256("/dev/mapper/app"), host.sum, "the image after writes")
    after_boot(mount)
    os.unlink("/mnt/new")
    same_files(host.files)
    script("umount /mnt; dmsetup remove work; obdsetup close app; vgchange --activate n vg")
    gone(before)


def make_guest():
    """Makes vm.obd, a disk that is a physical volume, like one that a virtual machine has written. Returns the sums of
    its files."""
    if not os.path.exists("vm.obd"):
        script("""truncate --size=64M vm.raw
            losetup --find vm.raw
            loop=$(losetup --noheadings --output NAME --associated vm.raw)
            vgcreate --quiet guest $loop
            lvcreate --quiet --yes --name root --size 40m guest
            mkfs.ext4 -q -d /usr/lib/udev/rules.d /dev/guest/root
            vgchange --activate n guest
            losetup --detach $loop
            obdsetup create --image vm.raw vm.obd""")
        forget()
    return files("/usr/lib/udev/rules.d")


def guest_mounted(title):
    """Runs the first two blocks of a recipe, which mount the image of a virtual machine, and checks its files. Returns
    the state before, and the recipe."""
    Host()
    wanted = make_guest()
    before = state()
    recipe = Recipe(title)
    recipe.step()
    recipe.step()
    same_files(wanted)
    return before, recipe


@test("an image with a physical volume: without a filter or a devices file, the host's LVM activates its volumes")
def activated():
    Host()
    make_guest()
    before = state()
    script("obdsetup open vm vm.obd")
    udevd.settle()
    check(os.path.exists("/dev/guest/root"), "LVM did not activate the guest's volume; lvm.rst says that it does")
    script("vgchange --activate n guest; obdsetup close vm")
    gone(before)


@test("an image with a physical volume: the host's devices file lacks it, and LVM uses it with another one")
def devices_file():
    before, recipe = guest_mounted("With a devices file")
    lvm_is_content()
    check("guest" not in script("vgs; pvs; lvs"), "the host's LVM shows the volume group of the guest")
    equal(sha256("/dev/mapper/vm"), sha256("vm.raw"), "content of the image")
    script("umount /mnt")
    said = script("blkdeactivate --lvmoptions retry /dev/mapper/vm")
    check(os.path.exists("/dev/guest/root"), f"blkdeactivate has deactivated the guest's volume: {said}")
    script("mount -o ro /dev/guest/root /mnt")
    recipe.step()
    gone(before)


@test("an image with a physical volume: a filter hides it, and LVM uses a writable snapshot of it")
def filtered():
    before, recipe = guest_mounted("With a filter and a writable snapshot")
    write("first\n")
    lvm_is_content()
    equal(script("pvs --noheadings --options pv_name --select vg_name=guest").split(), ["/dev/mapper/vm"], "PV")
    recipe.step()
    script("vgchange --activate n vg")
    gone(before)


@test("blkdeactivate takes a whole stack down, in order")
def down():
    host = Host()
    before = state()
    script("""bytes=$(stat --format=%s base.obd)
        lvcreate --name base --size $((bytes / 512 + 1))s vg
        dd if=base.obd of=/dev/vg/base bs=1M conv=fsync status=none
        obdsetup open app /dev/vg/base:$bytes app.obd
        lvcreate --name cow --size 16m vg
        dmsetup create work --table "0 65536 snapshot /dev/mapper/app /dev/vg/cow P 8"
        mount /dev/mapper/work /mnt""")
    same_files(host.files)
    lvm_is_content()
    said = Recipe("Taking everything down").step()
    order = re.findall(r": deactivating (?:Logical Volume |\w+ device )([\w/.-]*\w)", said)
    # The names of the layers' devices contain 16 digits.
    order = [re.sub(r"^(base|app\.obd)-[0-9a-f]{16}-", r"\1-", name) for name in order]
    wanted = {"work", "app", "base-zfile", "app.obd-zfile", "vg/base", "vg/cow"}
    check(wanted <= set(order) and "skipping" not in said, f"blkdeactivate has left a device: {said}")
    for above, below in (("work", "app"), ("work", "vg/cow"), ("app", "base-zfile"), ("app", "app.obd-zfile"),
                         ("base-zfile", "vg/base")):
        check(order.index(above) < order.index(below), f"{above} was not taken down before {below}: {said}")
    gone(before)


if __name__ == "__main__":
    udevd.start()
    main()
