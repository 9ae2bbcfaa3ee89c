# SPDX-License-Identifier: GPL-2.0
"""Disks of the machine in which the tests run: plugging them in and pulling them out.

If the test VM is QEMU, a virtio port in it is connected to QEMU's monitor. In other machines, a Disk raises Skip.
"""

import glob
import json
import os
import time

from . import dm
from .ktap import SLOW, Failure, Skip, defer
from .programs import need_module

_PORTS = "/sys/class/virtio-ports"
# The directory in which QEMU runs, as it is called in the test VM.
_DIRECTORY = "/run/vm"


class _Monitor:
    """QEMU's monitor (QMP)."""

    def __init__(self):
        names = os.listdir(_PORTS) if os.path.isdir(_PORTS) else []
        for name in names:
            with open(f"{_PORTS}/{name}/name", encoding="ascii") as file:
                if file.read().strip() == "monitor":
                    self.port = open(f"/dev/{name}", "r+b", buffering=0)
                    break
        else:
            raise Skip("disks can be pulled out only in the test VM with QEMU")
        self.rest = b""
        self.call("qmp_capabilities")

    def call(self, command, **arguments):
        request = {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self.port.write(json.dumps(request).encode() + b"\r\n")
        while True:
            while b"\n" not in self.rest:
                self.rest += self.port.read(4096)
            line, self.rest = self.rest.split(b"\n", 1)
            answer = json.loads(line)
            if "error" in answer:
                raise Failure(f"{command}: {answer['error']}")
            if "return" in answer:
                return


_monitor = None


def _call(command, **arguments):
    global _monitor
    _monitor = _monitor or _Monitor()
    _monitor.call(command, **arguments)


def _wait(condition, what):
    for _ in range(400 * SLOW):
        if condition():
            return
        time.sleep(0.05)
    raise Failure(f"{what}: not within {20 * SLOW} s")


class Disk:
    """An NVMe or SCSI disk of the machine that can be pulled out. Reads of the bad sectors fail as on a broken
    medium."""

    count = 0

    def __init__(self, kind, content, bad_sectors=()):
        # Scan only the place of the disk: a bus has 256 places, and scanning all takes long in an emulated machine.
        for module, *options in {"nvme": [("nvme",)],
                                 "scsi": [("scsi_mod", "scan=manual"), ("virtio_scsi",), ("sd_mod",)]}[kind]:
            need_module(module, options=options)
        Disk.count += 1
        self.id = f"disk{os.getpid()}-{Disk.count}"
        name = f"{self.id}.raw"
        before = set(os.listdir("/sys/block"))
        # Raises Skip outside of the test VM, before a file is made.
        _call("query-status")
        with open(f"{_DIRECTORY}/{name}", "wb") as file:
            file.write(content)
            file.truncate(max(-(-len(content) // 4096) * 4096, 1 << 20))
        defer(os.unlink, f"{_DIRECTORY}/{name}")
        errors = [{"event": "none", "sector": sector, "errno": 5} for sector in bad_sectors]
        _call("blockdev-add", driver="blkdebug", node_name=self.id, image={"driver": "file", "filename": name},
              **({"inject_error": errors} if errors else {}))
        defer(self._drop_node)
        self.devices = [self.id]
        if kind == "nvme":
            _call("device_add", driver="nvme", id=self.id, drive=self.id, serial=self.id)
        else:
            self.devices.append(f"{self.id}-bus")
            _call("device_add", driver="virtio-scsi-pci", id=f"{self.id}-bus")
            _call("device_add", driver="scsi-hd", id=self.id, drive=self.id, bus=f"{self.id}-bus.0")
        defer(self._unplug_all)
        found = set()

        def new():
            for bus in glob.glob("/sys/class/scsi_host/host*/scan"):
                with open(bus, "w", encoding="ascii") as file:
                    file.write("0 0 0")
            found.update(name for name in set(os.listdir("/sys/block")) - before
                         if name.startswith(("nvme", "sd")) and os.path.exists(f"/dev/{name}"))
            return found

        _wait(new, f"the {kind} disk")
        self.name = found.pop()
        self.path = f"/dev/{self.name}"
        _wait(self._ready, f"the {kind} disk can be read")
        with open(f"/sys/block/{self.name}/dev", encoding="ascii") as file:
            self.number = file.read().strip()

    def _ready(self):
        try:
            with open(self.path, "rb", buffering=0) as file:
                return len(file.read(512)) == 512
        except OSError:
            return False

    def pull(self):
        """Pulls the disk out. Returns when the system has noticed."""
        _call("device_del", id=self.devices.pop(0))
        _wait(lambda: not os.path.exists(f"/sys/block/{self.name}"), "the disk is gone")

    def _unplug_all(self):
        while self.devices:
            _call("device_del", id=self.devices.pop(0))
        _wait(lambda: not os.path.exists(f"/sys/block/{self.name}"), "the disk is gone")

    def _drop_node(self):
        for _ in range(100):
            try:
                _call("blockdev-del", node_name=self.id)
                return
            except Failure:
                time.sleep(0.05)
        raise Failure(f"{self.id} is still in use by the machine")


def linear(disk):
    """Returns a linear device over a disk, so that its errors can be compared with those of the targets."""
    with open(f"/sys/block/{disk.name}/size", encoding="ascii") as file:
        return dm.linear(disk, int(file.read()), readonly=True)
