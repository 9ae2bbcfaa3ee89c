# SPDX-License-Identifier: GPL-2.0
"""systemd-udevd with the project's rules, as on other machines; the test VM normally runs without udevd.

start() also reverts the settings that the VM has because udevd does not run there: DM_DISABLE_UDEV for libdevmapper,
and LVM's lvmlocal.conf. At the end of the script, udevd stops and the configuration is restored.
"""

import atexit
import contextlib
import glob
import os
import shutil
import signal
import subprocess
import time

from .ktap import SLOW, skip_all

_UDEVD = "/usr/lib/systemd/systemd-udevd"
_CONTROL = "/run/udev/control"
_LVM_LOCAL = "/etc/lvm/lvmlocal.conf"
_RULES = os.path.join(os.path.dirname(__file__), "../../tools/udev/*.rules")

_daemon = None


def start():
    """Starts udevd and announces all block devices to it. Ends the script if udevd cannot run."""
    if "OBD_VM" not in os.environ:
        skip_all("udevd is started in the test VM only")
    if not os.path.exists(_UDEVD):
        skip_all("no udevd")
    atexit.register(stop)
    os.makedirs("/run/udev/rules.d", exist_ok=True)
    for path in glob.glob(_RULES):
        shutil.copy(path, "/run/udev/rules.d")
    if os.path.exists(_LVM_LOCAL):
        os.rename(_LVM_LOCAL, _LVM_LOCAL + ".no-udevd")
    os.environ.pop("DM_DISABLE_UDEV", None)
    global _daemon
    _daemon = subprocess.Popen([_UDEVD], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200 * SLOW):
        if os.path.exists(_CONTROL):
            break
        time.sleep(0.05)
    subprocess.run(["udevadm", "trigger", "--action=add", "--subsystem-match=block"], check=True)
    settle()


def settle():
    """Waits until udevd has processed all events."""
    subprocess.run(["udevadm", "settle", f"--timeout={60 * SLOW}"], check=True)


def pause():
    """Suspends udevd."""
    _daemon.send_signal(signal.SIGSTOP)


def go_on():
    """Resumes udevd."""
    _daemon.send_signal(signal.SIGCONT)


def properties(path):
    """Returns the properties of a device in udevd's database."""
    out = subprocess.run(["udevadm", "info", "--query=property", f"--name={path}"], capture_output=True, text=True,
                         check=True).stdout
    return dict(row.split("=", 1) for row in out.splitlines())


def links(path):
    """Returns the links to a device, relative to /dev."""
    return set(properties(path).get("DEVLINKS", "").replace("/dev/", "").split())


def stop():
    """Stops udevd. start() starts it again."""
    if _daemon:
        _daemon.terminate()
        _daemon.wait()
    # LVM starts dmeventd to monitor volumes. Its pid file may be stale, which must not stop the rest.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        with open("/run/dmeventd.pid", encoding="ascii") as file:
            os.kill(int(file.read()), signal.SIGTERM)
    # libdevmapper checks whether this directory exists.
    shutil.rmtree("/run/udev", ignore_errors=True)
    for path in glob.glob("/run/lvm/*_online/*"):
        os.unlink(path)
    if os.path.exists(_LVM_LOCAL + ".no-udevd"):
        os.rename(_LVM_LOCAL + ".no-udevd", _LVM_LOCAL)
