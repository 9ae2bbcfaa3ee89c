# SPDX-License-Identifier: GPL-2.0
"""Guests: QEMU processes on this machine, their initrds, and the memory of this machine that they use.

A guest's disks are pmem devices, one for each layer, or virtio-blk. Its initrd opens and mounts the image and runs a
shell on the serial port, to which ask() sends commands.
"""

import contextlib
import ctypes
import mmap
import os
import re
import select
import shutil
import subprocess
import time

from .ktap import SLOW, Failure, defer

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
MIB = 1 << 20
MODULE = "dm_overlaybd"

# The kernel of guests that run inside the test VM, as scripts/vm.sh chooses it: the VM's own, or another one if the VM
# is User-Mode Linux. It is a file that QEMU boots, and a release, whose modules are below lib/modules of a directory.
KERNEL = os.environ.get("OBD_VM_KERNEL", "")
RELEASE = os.environ.get("OBD_VM_RELEASE", os.uname().release)
MODULES = os.environ.get("OBD_VM_MODULES", "/")

# What the initrd does. In the guest's command line, obd.table is the table line of the mapped device, if there is one;
# obd.last, the last disk, for which the initrd waits up to a second; obd.device, the device to mount; and obd.mount,
# the mount options.
INIT = r"""#!/bin/busybox sh
export PATH=/bin DM_DISABLE_UDEV=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
word() { sed -n "s/.*obd\.$1=\"\([^\"]*\)\".*/\1/p" /proc/cmdline; }
table=$(word table)
for nth in 1 2 3 4 5 6 7 8 9 10; do
	[ ! -b "$(word last)" ] || break
	sleep 0.1
done
[ -z "$table" ] || dmsetup create --readonly --table "$table" image || dmesg | tail -n 3
mount -t ext4 -o "$(word mount)" "$(word device)" /mnt || dmesg | tail -n 3
head -c 1 /mnt/first >/dev/null && echo "@first byte"
exec switch_root /mnt /bin/busybox sh /guest
"""

# A shell on the serial port.
SHELL = r"""busybox stty -echo </dev/ttyS0
echo "@booted"
while read -r line; do
	eval "$line" 2>&1
	echo "@status $?"
done </dev/ttyS0
"""

# The file "guest" of an image: the script that the guest runs from the mounted image.
GUEST = r"""export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
""" + SHELL


def module_files(release, names):
    """Returns the files of modules and of the modules that they need, in the order in which they are loaded."""
    files = []
    for name in names:
        done = subprocess.run(["modprobe", "-d", MODULES, "-S", release, "--show-depends", name], capture_output=True,
                              text=True, check=False)
        for line in done.stdout.splitlines():
            words = line.split()
            if words[0] == "insmod" and words[1] not in files:
                files.append(words[1])
    return files


def _libraries(program):
    """Returns the files of the libraries that a program is linked with."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return re.findall(r"(?:=> |^\s*)(/\S+) \(", done.stdout, re.MULTILINE)


def make_initrd(path, init, release, modules, programs=(), module=None):
    """Makes an initrd with busybox, other programs, and modules: the named ones of the kernel, the file `module` if it
    is given, and all modules that these need. /modules/order has their names in the order in which they are loaded."""
    tree = f"{path}.tree"
    for name in ("bin", "modules", "proc", "sys", "dev", "mnt"):
        os.makedirs(f"{tree}/{name}")
    shutil.copy(shutil.which("busybox"), f"{tree}/bin/busybox")
    for applet in subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            os.symlink("busybox", f"{tree}/bin/{applet}")
    for program in map(shutil.which, programs):
        shutil.copy(program, f"{tree}/bin/")
        for library in _libraries(program):
            os.makedirs(os.path.dirname(f"{tree}{library}"), exist_ok=True)
            shutil.copy(library, f"{tree}{library}")
    with open(f"{tree}/init", "w", encoding="ascii") as file:
        file.write(init)
    os.chmod(f"{tree}/init", 0o755)
    if module:
        fields = subprocess.run(["modinfo", "-F", "depends", module], capture_output=True, text=True, check=True)
        modules = [*modules, *fields.stdout.strip().split(",")]
    order = []
    for file in module_files(release, modules):
        name = os.path.basename(file).split(".ko")[0] + ".ko"
        unpack = {".xz": ["xz", "-dc"], ".zst": ["zstd", "-qdc"], ".gz": ["gzip", "-dc"]}
        command = unpack.get(os.path.splitext(file)[1], ["cat"])
        with open(f"{tree}/modules/{name}", "wb") as out:
            subprocess.run([*command, file], stdout=out, check=True)
        order.append(name)
    if module:
        order.append(os.path.basename(module))
        subprocess.run(["strip", "--strip-debug", "-o", f"{tree}/modules/{order[-1]}", module], check=True)
    with open(f"{tree}/modules/order", "w", encoding="ascii") as file:
        file.writelines(f"{name}\n" for name in order)
    with open(path, "wb") as out:
        names = subprocess.run(["find", "."], cwd=tree, capture_output=True, check=True).stdout
        subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=tree, input=names, stdout=out, check=True)
    shutil.rmtree(tree)


def qemu(kernel, initrd, files, pmem=True, table=None, memory=192, cache="writeback", accel="tcg"):
    """Returns the command of a guest that begins with INIT.

    files are its disks: pmem devices if pmem is set, else virtio-blk. table is a function that takes the names of the
    disks and returns a table line for dmsetup; without `table`, the first disk is mounted. memory is in MiB.
    """
    disks = [f"/dev/pmem{nth}" if pmem else f"/dev/vd{'abcdefghij'[nth]}" for nth in range(len(files))]
    words = {"last": disks[-1], "device": "/dev/mapper/image" if table else disks[0],
             "mount": "ro,noload,dax=always" if pmem else "ro,noload"}
    if table:
        words["table"] = table(disks)
    append = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check 8250.nr_uarts=1 lsm=capability audit=0 " \
        "cryptomgr.notests rcupdate.rcu_expedited=1 tsc=nowatchdog " + \
        " ".join(f'obd.{key}="{value}"' for key, value in words.items())
    # A device may need up to 2 MiB more, for its alignment.
    room = sum(size_of(path) + HUGE for path in files) // MIB if pmem else 0
    command = [
        "qemu-system-x86_64", "-machine", "pc,memory-backend=ram", "-accel", accel, "-cpu", "max,la57=off",
        # The memory is a file, so that smaps has a name for it.
        "-object", f"memory-backend-memfd,id=ram,size={memory}M,share=on", "-m", f"{memory}M,maxmem={memory + room + 64}M",
        "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-monitor", "none",
        "-kernel", kernel, "-initrd", initrd, "-append", append]
    for nth, path in enumerate(files):
        # A comma in a path is doubled.
        path = os.path.abspath(path).replace(",", ",,")
        if pmem:
            command += ["-object", f"memory-backend-file,id=layer{nth},mem-path={path},size={size_of(files[nth])},"
                        "align=2M,share=on,readonly=on", "-device", f"virtio-pmem-pci,memdev=layer{nth}"]
        else:
            command += ["-drive", f"file={path},format=raw,if=virtio,readonly=on,cache={cache}"]
    return command


class Guest:
    """A QEMU process whose standard input and output are the serial port of the guest. files are the files of its
    disks."""

    def __init__(self, name, command, files, enter=None, timeout=600):
        self.name, self.files, self.timeout, self.rest = name, files, timeout * SLOW, ""
        self.started = time.monotonic()
        # pylint: disable-next=consider-using-with,subprocess-popen-preexec-fn
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, preexec_fn=enter)
        defer(self.stop)

    @property
    def pid(self):
        return self.process.pid

    def wait_for(self, mark):
        """Reads until a line has the mark. Returns the lines before it, and that line from the mark on."""
        before, end = [], time.monotonic() + self.timeout
        while True:
            while "\n" in self.rest:
                line, self.rest = self.rest.split("\n", 1)
                # Output of the firmware may be on the same line.
                at = line.find(mark)
                if at >= 0:
                    return before, line[at:].rstrip("\r")
                before.append(line.rstrip("\r"))
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise Failure(f"{self.name}: no {mark!r} within {self.timeout} s: {' '.join(before[-60:])}")
            got = os.read(self.process.stdout.fileno(), 65536)
            if not got:
                raise Failure(f"{self.name} has ended: {' '.join([*before, self.rest][-60:])}")
            self.rest += got.decode("ascii", "replace")

    def boot(self, *marks):
        """Waits for each of the marks. Returns the seconds from the start of QEMU to each."""
        times = []
        for mark in marks:
            self.wait_for(mark)
            times.append(time.monotonic() - self.started)
        return times

    def send(self, command):
        """Starts a command in the guest. answer() waits for it and returns its output."""
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()

    def answer(self):
        """Waits for the end of the command. Returns the lines that it has printed. Fails if it has failed."""
        lines, mark = self.wait_for("@status")
        if mark != "@status 0":
            raise Failure(f"{self.name}: {mark}: {' '.join(lines)}")
        return lines

    def ask(self, command):
        self.send(command)
        return self.answer()

    def meminfo(self):
        """Returns the guest's /proc/meminfo in KiB."""
        return {row.split(":")[0]: int(row.split()[1]) for row in self.ask("busybox cat /proc/meminfo")}

    def mappings(self):
        """Returns the fields of QEMU's smaps in KiB, for the guest's memory ("ram") and for each of `files` that QEMU
        maps."""
        names = {os.path.realpath(path): path for path in self.files}
        found, fields = {}, {}
        with open(f"/proc/{self.pid}/smaps", encoding="utf-8") as file:
            for row in file:
                words = row.split(maxsplit=5)
                if re.match("[0-9a-f]+-[0-9a-f]+$", words[0]):
                    path = words[5].rstrip("\n") if len(words) > 5 else ""
                    path = "ram" if path.startswith("/memfd:memory-backend-memfd") else names.get(path)
                    fields = found.setdefault(path, {}) if path else {}
                elif words[-1] == "kB":
                    name = words[0].rstrip(":")
                    fields[name] = fields.get(name, 0) + int(words[1])
        return found

    def stop(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def size_of(path):
    """Returns the size in bytes of a file or of a block device."""
    with open(path, "rb") as file:
        return file.seek(0, os.SEEK_END)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def in_page_cache(path):
    """Returns how many KiB of a file, or of a block device, this machine has in its page cache."""
    size = size_of(path)
    if not size:
        return 0
    pages = -(-size // PAGE)
    with open(path, "rb") as file:
        at = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if at == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        try:
            state = ctypes.create_string_buffer(pages)
            if _libc.mincore(at, size, state):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            _libc.munmap(at, size)
    return sum(byte & 1 for byte in state.raw[:pages]) * PAGE >> 10
