#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""`convert' makes stacks of container images. The mounted stack equals the trees that GNU tar and umoci make of the
same layers."""

import io
import json
import os
import random
import shutil
import stat
import subprocess
import tarfile
import tempfile
import time
import uuid

from obdtest import golden, programs, tree
from obdtest.files import work_directory
from obdtest.ktap import SLOW, Skip, add, check, defer, equal, main, note, test
from obdtest.oci import Layout
from obdtest.programs import need, need_module, quietly
from obdtest.recipes import recipe, sh

NAME = f"obdtest-{os.getpid()}-oci"
DEVICE = f"/dev/mapper/{NAME}"
# The image that scripts/debian-image.sh has made, as the VM sees it.
DEBIAN = "/mnt/debian-image"
PAX = ("--format=pax", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner")


def run(*command, timeout=300):
    """Runs a command, which must succeed. Returns its standard output."""
    return programs.run(*command, timeout=timeout * SLOW)


def workplace():
    need("obdsetup")
    need_module("erofs")
    work = work_directory()
    os.mkdir(f"{work}/mnt")
    return work


def tar_of_file(path, name, text):
    """Makes a tar with one file."""
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))


def mounted(work, stack):
    """Opens and mounts a stack. Returns the mount point."""
    run("obdsetup", "open", NAME, stack)
    defer(quietly, "obdsetup", "close", NAME)
    run("mount", "-t", "erofs", "-o", "ro", DEVICE, f"{work}/mnt")
    defer(quietly, "umount", f"{work}/mnt")
    return f"{work}/mnt"


def start(work, *command):
    """Starts a server, which ends with the test."""
    with open(f"{work}/{command[0]}.log", "wb") as log:
        # pylint: disable-next=consider-using-with
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    defer(server.wait)
    defer(server.kill)


def until(true, what):
    """Waits up to a minute for something."""
    end = time.monotonic() + 60 * SLOW
    while not true():
        check(time.monotonic() < end, what)
        time.sleep(0.2)


def mount_tmpfs(path):
    os.makedirs(path, exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", path)
    defer(quietly, "umount", "--recursive", path)


def containerd(work):
    """Starts containerd, with its files on a tmpfs: overlayfs, which the root of the VM is, can't be below an overlayfs."""
    mount_tmpfs("/var/lib/containerd")
    start(work, "containerd")
    until(lambda: not os.system("ctr version >/dev/null 2>&1"), "containerd answers")


def blobs(layout):
    return sorted(os.listdir(f"{layout}/blobs/sha256"))


def down(work):
    run("umount", f"{work}/mnt")
    run("obdsetup", "close", NAME)


class Reference:
    """The merged tree of layers: GNU tar unpacks each layer, after the files that its whiteouts hide were removed."""

    def __init__(self, root):
        self.root = root
        os.mkdir(root)

    def path(self, name):
        return os.path.join(self.root, name)

    def remove(self, name):
        path = self.path(name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)

    def apply(self, name):
        """Applies the layer in the tar `name` to the tree."""
        with tarfile.open(name, errors="surrogateescape") as tar:
            members = tar.getmembers()
        special, others = [], []
        for member in members:
            place, last = os.path.split(os.path.normpath(member.name))
            if last == ".wh..wh..opq":
                special += [os.path.join(place, name) for name in os.listdir(self.path(place))]
            elif last.startswith(".wh."):
                special.append(os.path.join(place, last.removeprefix(".wh.")))
            else:
                others.append(member)
        for hidden in special:
            self.remove(hidden)
        for member in others:
            path = self.path(os.path.normpath(member.name))
            if not os.path.lexists(path):
                continue
            if member.isdir() != (os.path.isdir(path) and not os.path.islink(path)):
                self.remove(member.name)
            elif member.isdir():
                for attribute in os.listxattr(path):
                    os.removexattr(path, attribute)
        run("tar", *PAX, "--same-owner", "--same-permissions", "--exclude=.wh.*", "-xf", name, "-C", self.root)


class LayerMaker:
    """Makes a layer with random changes to the tree of a reference."""

    def __init__(self, reference, seed, number):
        self.rng = random.Random(seed)
        self.reference, self.number = reference, number
        self.members = []
        # The paths that the layer changes.
        self.touched = set()

    def free(self, path):
        """Returns whether the layer changes neither this path nor one above or below it."""
        parts = path.split("/")
        above = {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
        return not above & self.touched and not any(other.startswith(f"{path}/") for other in self.touched)

    def choose(self, wanted):
        """Returns a random path that wanted() accepts and that the layer doesn't change yet; None if there is none."""
        found = []
        for place, directories, files in os.walk(self.reference.root):
            for name in directories + files:
                path = os.path.relpath(os.path.join(place, name), self.reference.root)
                if path.isascii() and path.isprintable() and self.free(path) and wanted(self.reference.path(path)):
                    found.append(path)
        if not found:
            return None
        path = self.rng.choice(sorted(found))
        self.touched.add(path)
        return path

    def add(self, name, kind=tarfile.REGTYPE, content=b"", **fields):
        member = tarfile.TarInfo(name)
        member.type, member.size, member.mtime = kind, len(content), 1700000000 + self.number
        member.mode = 0o750 if kind == tarfile.DIRTYPE else 0o640
        for field, value in fields.items():
            setattr(member, field, value)
        self.members.append((member, content))

    def whiteout(self):
        if path := self.choose(lambda path: True):
            place, last = os.path.split(path)
            self.add(os.path.join(place, f".wh.{last}"))
            if self.rng.random() < 0.4:
                # Make another file of this name, before or after the whiteout.
                self.add(path, content=b"anew")

    def opaque(self):
        if path := self.choose(lambda path: os.path.isdir(path) and not os.path.islink(path)):
            self.add(f"{path}/.wh..wh..opq")
            self.add(f"{path}/only", content=b"only this")

    def replace(self):
        if path := self.choose(lambda path: True):
            if self.rng.random() < 0.4:
                self.add(path, tarfile.DIRTYPE, uid=1000)
            elif self.rng.random() < 0.5:
                self.add(path, tarfile.SYMTYPE, linkname="/no/where", mode=0o777)
            else:
                self.add(path, content=self.rng.randbytes(self.rng.choice((10, 5000, 100000))), gid=7)

    def link(self):
        if path := self.choose(lambda path: stat.S_ISREG(os.lstat(path).st_mode)):
            self.add(f"linked{self.number}-{len(self.members)}", tarfile.LNKTYPE, linkname=path)

    def make(self, name):
        """Makes the tar: a new random tree, and the changes before or after it."""
        with tempfile.TemporaryDirectory(prefix="obdtest-") as stage:
            own = f"{stage}/new{self.number}"
            os.mkdir(own)
            tree.Maker(own, self.rng.randrange(1 << 30)).make()
            run("tar", *PAX, "--sparse", "-cf", f"{stage}/own.tar", "-C", stage, f"new{self.number}")
            for _ in range(8 if self.number else 0):
                self.rng.choice((self.whiteout, self.whiteout, self.opaque, self.replace, self.link))()
            self.rng.shuffle(self.members)
            front = self.rng.random() < 0.5
            changes = io.BytesIO()
            with tarfile.open(fileobj=changes, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for member, content in self.members:
                    tar.addfile(member, io.BytesIO(content))
                end = tar.offset
            with open(f"{stage}/own.tar", "rb") as file:
                random_tree = file.read()
            parts = [changes.getvalue()[:end], random_tree]
            # Only the last part may have an end marker.
            while not front and parts[1].endswith(bytes(512)):
                parts[1] = parts[1][:-512]
            if not front:
                parts = [parts[1], parts[0] + bytes(1024)]
            with open(name, "wb") as file:
                file.write(b"".join(parts))


def without_times_of_directories(manifest):
    """Removes the times and link counts of directories from a manifest. Unpacking changes the times of directories that
    a layer doesn't contain."""
    for seen in manifest.values():
        if seen["mode"][0] == "d":
            del seen["mtime"]
            # File systems count the links of directories in different ways.
            seen.pop("names", None)
    return manifest


# umoci ignores tar's records of ACLs, and records without a value.
NOT_UMOCI = ("system.posix_acl_access", "system.posix_acl_default", "trusted.empty")


def same_tree(got, wanted, umoci=False):
    """Compares two manifests; umoci is set if the second one is umoci's. The properties of the root directory are
    ignored."""
    equal(sorted(got), sorted(wanted), "names")
    for path, seen in wanted.items():
        for what, value in seen.items():
            here = got[path].get(what)
            if umoci and what == "xattrs":
                here, value = ({name: of[name] for name in of if name not in NOT_UMOCI} for of in (here, value))
            elif umoci and what == "mtime":
                # umoci has the nanoseconds since 1970 in 64 bits, which overflow.
                here = (here + (1 << 63)) % (1 << 64) - (1 << 63)
            if path != b".":
                equal(here, value, f"{path}: {what}")


def umoci_tree(work, layout, timeout=300):
    """Returns the manifest of the tree to which umoci unpacks an image; None without umoci."""
    if not shutil.which("umoci"):
        return None
    run("umoci", "unpack", "--image", f"{layout}:latest", f"{work}/umoci", timeout=timeout)
    return without_times_of_directories(tree.manifest(f"{work}/umoci/rootfs"))


def merged(seed):
    work = workplace()
    reference = Reference(f"{work}/reference")
    tars = []
    for number in range(4):
        name = f"{work}/layer{number}.tar"
        LayerMaker(reference, seed * 100 + number, number).make(name)
        reference.apply(name)
        tars.append(name)
    wanted = without_times_of_directories(tree.manifest(reference.root))
    Layout(f"{work}/layout", tars)
    run("obdsetup", "convert", f"{work}/layout", f"{work}/app")
    run("obdsetup", "verify", f"{work}/app/config.v1.json")
    where = mounted(work, f"{work}/app/config.v1.json")
    got = without_times_of_directories(tree.manifest(where))
    note(f"seed {seed}: {len(wanted)} files in 4 layers")
    same_tree(got, wanted)
    if second := umoci_tree(work, f"{work}/layout"):
        same_tree(got, second, umoci=True)
    down(work)
    if shutil.which("fsck.erofs"):
        run("obdsetup", "export", "--output", f"{work}/disk", f"{work}/app/config.v1.json")
        run("fsck.erofs", f"{work}/disk")
    # Convert the image for a registry, and that back.
    run("obdsetup", "convert", f"{work}/layout", f"{work}/pushed", "--oci", "--cache", f"{work}/cache")
    run("obdsetup", "convert", f"{work}/pushed", f"{work}/back")
    where = mounted(work, f"{work}/back/config.v1.json")
    same_tree(without_times_of_directories(tree.manifest(where)), got)
    down(work)


@test("convert reads archives and layouts that skopeo copied, with the same layers; skopeo copies images of --oci",
      timeout=600)
def skopeo():
    need("skopeo")
    work = workplace()
    for name in ("one", "two"):
        tar_of_file(f"{work}/{name}.tar", f"etc/{name}", name)
    Layout(f"{work}/layout", [f"{work}/one.tar", f"{work}/two.tar"])
    run("obdsetup", "convert", f"{work}/layout", f"{work}/app")
    for number, target in enumerate(("docker-archive:saved.tar:app:latest", "oci-archive:oci.tar", "oci:copied:latest")):
        kind, place = target.split(":", 1)
        run("skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{work}/layout:latest", f"{kind}:{work}/{place}")
        place = place.split(":")[0]
        run("obdsetup", "convert", f"{work}/{place}", f"{work}/app{number}")
        for layer in ("layer0.obd", "layer1.obd"):
            run("cmp", f"{work}/app/{layer}", f"{work}/app{number}/{layer}")
    run("obdsetup", "convert", f"{work}/layout", f"{work}/pushed", "--oci")
    # skopeo checks digests and sizes. By default, it compresses layers when it copies.
    copy = ("skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{work}/pushed:latest")
    run(*copy, f"oci:{work}/packed:latest")
    done = subprocess.run(["obdsetup", "convert", f"{work}/packed", f"{work}/x"], capture_output=True, check=False)
    check(b"which was compressed: copy the image again" in done.stderr, f"message of the refusal: {done.stderr}")
    run(*copy, "--preserve-digests", f"oci:{work}/pulled:latest")
    told = json.loads(run("skopeo", "inspect", "--config", f"oci:{work}/pulled:latest"))
    equal(told["config"]["Cmd"], ["/bin/true"], "command of the image")
    run("obdsetup", "convert", f"{work}/pulled", f"{work}/back")
    where = mounted(work, f"{work}/back/config.v1.json")
    equal(sorted(os.listdir(f"{where}/etc")), ["one", "two"], "files")
    down(work)


@test("an image from a registry goes back to it with --oci; skopeo and containerd fetch it, and its layers are the same",
      timeout=600)
def registry():
    if "OBD_VM" not in os.environ:
        raise Skip("it starts a containerd: only in the test VM")
    need("skopeo", "docker-registry", "ctr", "containerd")
    work = workplace()
    for name in ("one", "two"):
        tar_of_file(f"{work}/{name}.tar", f"etc/{name}", name)
    Layout(f"{work}/layout", [f"{work}/one.tar", f"{work}/two.tar"])
    address = f"127.0.0.1:{random.randint(20000, 30000)}"
    with open(f"{work}/config.yml", "w", encoding="ascii") as file:
        json.dump({"version": 0.1, "storage": {"filesystem": {"rootdirectory": f"{work}/registry"}},
                   "http": {"addr": address}}, file)
    start(work, "docker-registry", "serve", f"{work}/config.yml")
    until(lambda: not os.system(f"busybox wget -qO /dev/null http://{address}/v2/ 2>/dev/null"), "the registry answers")
    copy = ("skopeo", "--insecure-policy", "copy", "--quiet", "--preserve-digests")
    run(*copy, "--dest-tls-verify=false", f"oci:{work}/layout:latest", f"docker://{address}/plain:latest")
    run(*copy, "--src-tls-verify=false", f"docker://{address}/plain:latest", f"oci:{work}/fetched:latest")
    run("obdsetup", "convert", f"{work}/fetched", f"{work}/layers", "--oci")
    run(*copy, "--dest-tls-verify=false", f"oci:{work}/layers:latest", f"docker://{address}/layers:latest")
    run(*copy, "--src-tls-verify=false", f"docker://{address}/layers:latest", f"oci:{work}/pulled:latest")
    equal(blobs(f"{work}/pulled"), blobs(f"{work}/layers"), "blobs that the registry has")
    containerd(work)
    run("ctr", "content", "fetch", "--plain-http", f"{address}/layers:latest")
    known = run("ctr", "content", "ls", "--quiet").split()
    check(set(blobs(f"{work}/layers")) <= {digest.removeprefix("sha256:") for digest in known},
          "containerd does not have all blobs of the image")
    run("obdsetup", "convert", f"{work}/pulled", f"{work}/app")
    where = mounted(work, f"{work}/app/config.v1.json")
    equal(sorted(os.listdir(f"{where}/etc")), ["one", "two"], "files")
    down(work)


@test("packages of Debian in three layers: as GNU tar and umoci have them, and their programs run", timeout=900)
def debian():
    need("dpkg", "umoci")
    work = workplace()
    reference = Reference(f"{work}/reference")
    tars = []
    for number, packages in enumerate((("base-files", "libc6"), ("dash", "libpcre2-8-0", "grep"), ("sed", "libselinux1",
                                                                                                "libacl1"))):
        files = run("dpkg", "-L", *packages).split("\n")
        files = sorted({name.lstrip("/") for name in files if os.path.lexists(name) and name != "/."})
        with open(f"{work}/names", "w", encoding="utf-8") as file:
            file.write("\0".join(files))
        tars.append(f"{work}/{number}.tar")
        run("tar", *PAX, "--no-recursion", "--null", "-cf", tars[-1], "-C", "/", "-T", f"{work}/names")
        reference.apply(tars[-1])
    Layout(f"{work}/layout", tars)
    run("obdsetup", "convert", f"{work}/layout", f"{work}/app")
    where = mounted(work, f"{work}/app/config.v1.json")
    got = without_times_of_directories(tree.manifest(where))
    note(f"{len(got)} files in 3 layers")
    same_tree(got, without_times_of_directories(tree.manifest(reference.root)))
    same_tree(got, umoci_tree(work, f"{work}/layout"), umoci=True)
    said = run("chroot", where, "/bin/sh", "-c", "echo one | sed s/one/two/ | grep two && grep ^ID= /etc/os-release")
    equal(said, "two\nID=debian\n", "output of its programs")
    down(work)


@test("Debian by mmdebstrap, in three layers by umoci: the same tree as that of umoci and GNU tar; the programs run",
      timeout=3600)
def debian_image():
    need("umoci")
    if not os.path.exists(f"{DEBIAN}/tree.tar"):
        raise Skip("no image of Debian; with a mirror, scripts/debian-image.sh makes it")
    work = workplace()
    run("obdsetup", "convert", f"{DEBIAN}/layout", f"{work}/app", timeout=1200)
    equal(len([name for name in os.listdir(f"{work}/app") if name.endswith(".obd")]), 3, "layers")
    run("obdsetup", "verify", f"{work}/app/config.v1.json", timeout=1200)
    where = mounted(work, f"{work}/app/config.v1.json")
    got = without_times_of_directories(tree.manifest(where))
    note(f"{len(got)} files in 3 layers")
    same_tree(got, umoci_tree(work, f"{DEBIAN}/layout", timeout=1200), umoci=True)
    shutil.rmtree(f"{work}/umoci")
    os.mkdir(f"{work}/tree")
    run("tar", *PAX, "--same-owner", "--same-permissions", "-xf", f"{DEBIAN}/tree.tar", "-C", f"{work}/tree",
        timeout=1200)
    same_tree(got, without_times_of_directories(tree.manifest(f"{work}/tree")))
    said = run("chroot", where, "/bin/sh", "-c",
               "cat /etc/hostname; dpkg-query -W -f '${Package} ${db:Status-Status}\\n' dash; test -e /usr/bin/less || echo gone")
    equal(said, "another machine\ndash installed\ngone\n", "output of its programs")
    down(work)


@test("hello-world of docker: the program of its image runs", timeout=600)
def hello():
    work = workplace()
    source = f"{golden.ROOT}/oci/hello-world"
    if not os.path.exists(source):
        raise Skip("no image of hello-world, see OBD_GOLDENS")
    run("obdsetup", "convert", source, f"{work}/hello", "--ref", "amd64")
    run("obdsetup", "convert", source, f"{work}/arm", "--ref", "nested-index", "--platform", "linux/arm64")
    with open(f"{work}/hello/image.json", encoding="utf-8") as file:
        equal(json.load(file)["config"]["Cmd"], ["/hello"], "command of the image")
    where = mounted(work, f"{work}/hello/config.v1.json")
    equal(os.listdir(where), ["hello"], "files")
    said = run("chroot", where, "/hello")
    check("Hello from Docker!" in said, said)
    down(work)
    where = mounted(work, f"{work}/arm/config.v1.json")
    with open(f"{where}/hello", "rb") as file:
        # The machine's number in an ELF file.
        equal(int.from_bytes(file.read(20)[18:], "little"), 183, "machine")
    down(work)


@test("common layers of two images are the same, byte for byte; below overlayfs, both images are writable",
      timeout=600)
def shared():
    need_module("overlay")
    work = workplace()
    for name, text in (("base", "base"), ("one", "1"), ("two", "2")):
        tar_of_file(f"{work}/{name}.tar", f"etc/{name}", text)
    for name in ("one", "two"):
        Layout(f"{work}/layout-{name}", [f"{work}/base.tar", f"{work}/{name}.tar"])
        run("obdsetup", "convert", f"{work}/layout-{name}", f"{work}/{name}", "--cache", f"{work}/cache")
    run("cmp", f"{work}/one/layer0.obd", f"{work}/two/layer0.obd")
    equal(len(os.listdir(f"{work}/cache")), 3, "layers in the cache")
    for name in ("one", "two"):
        where = mounted(work, f"{work}/{name}/config.v1.json")
        equal(sorted(os.listdir(f"{where}/etc")), ["base", name], "files")
        os.makedirs(f"{work}/top/{name}")
        os.makedirs(f"{work}/top/merged", exist_ok=True)
        run("mount", "-t", "tmpfs", "tmpfs", f"{work}/top/{name}")
        defer(quietly, "umount", f"{work}/top/{name}")
        for directory in ("upper", "work"):
            os.mkdir(f"{work}/top/{name}/{directory}")
        run("mount", "-t", "overlay", "overlay", "-o",
            f"lowerdir={where},upperdir={work}/top/{name}/upper,workdir={work}/top/{name}/work", f"{work}/top/merged")
        defer(quietly, "umount", f"{work}/top/merged")
        os.unlink(f"{work}/top/merged/etc/base")
        with open(f"{work}/top/merged/etc/new", "w", encoding="ascii") as file:
            file.write("new")
        equal(sorted(os.listdir(f"{work}/top/merged/etc")), sorted(["new", name]), "files of overlayfs")
        run("umount", f"{work}/top/merged")
        run("umount", f"{work}/top/{name}")
        down(work)


@test("Documentation/recipes.rst, a container: its program runs, and its writes go to the upper directory",
      timeout=600)
def container():
    if "OBD_VM" not in os.environ:
        raise Skip("it changes the system: only in the test VM")
    need("busybox", "unshare", "python3", "crun", "runc", "systemd-nspawn", "podman", "ctr", "containerd")
    need_module("overlay")
    work = workplace()
    if not os.path.exists("/sys/fs/cgroup/cgroup.procs"):
        run("mount", "-t", "cgroup2", "none", "/sys/fs/cgroup")
        defer(quietly, "umount", "/sys/fs/cgroup")
    # systemd-nspawn needs a machine ID, and in the VM this file is empty.
    with open("/etc/machine-id", "a+", encoding="ascii") as file:
        if not file.tell():
            file.write(f"{uuid.uuid4().hex}\n")
            defer(os.truncate, "/etc/machine-id", 0)
    script = b"#!/bin/busybox sh\n/bin/busybox echo pid $$ >/written\n/bin/busybox cat /written /etc/name\n"
    with open(shutil.which("busybox"), "rb") as file:
        busybox = file.read()
    with tarfile.open(f"{work}/base.tar", "w") as tar:
        for name, content in (("bin/busybox", busybox), ("bin/true", script), ("etc/name", b"of the image\n")):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
        member = tarfile.TarInfo("usr")
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)
    Layout(f"{work}/layout", [f"{work}/base.tar"])
    defer(os.chdir, os.getcwd())
    os.chdir(work)
    make, command, unshare, nspawn, crun, podman, ctr, down_again = recipe("A container of an image")
    # The root of the VM is an overlayfs, on which podman makes none.
    mount_tmpfs("/var/lib/containers")
    containerd(work)
    defer(quietly, "obdsetup", "close", "app")
    defer(quietly, "umount", f"{work}/lower")
    defer(quietly, "umount", f"{work}/root")
    sh(make)
    above = command + podman.replace("/root\"", "/lower\":O")
    for script in (command + unshare, command + nspawn, crun, crun.replace("crun", "runc"), command + podman,
                   command + ctr, above):
        quietly("rm", "-f", "config.json", "root/written")
        equal(sh(script), "pid 1\nof the image\n", "what the container says")
        equal("written" in os.listdir("upper"), script != above, "what it wrote is in the directory above")
        equal(sorted(os.listdir("lower")), ["bin", "etc", "usr"], "what is below")
    sh(down_again)
    check(not os.path.exists("/dev/mapper/app"), "the device is still there")


for number in (1, 2, 3):
    add(f"the stack of image {number} has the same tree as that of GNU tar", merged, number, timeout=900)

if __name__ == "__main__":
    main()
