#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Process 1 of the VM after its root file system is mounted: loads the module, runs the command or a shell, ends the VM.
# /run/vm is the host's run directory: the host writes env and, for a command, cmd; this script writes started and
# status.

# shellcheck disable=SC1091 # written by scripts/vm.sh for each run
. /run/vm/env
export HOME=/root LANG=C.UTF-8 TERM="${VM_TERM:-linux}" OBD_VM=1 DM_DISABLE_UDEV=1
export PATH="$VM_CLONE/build/cargo/release:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

trap 'busybox "$VM_END" -f' EXIT

# load_module: load the module's dependencies, then the module.
load_module() {
	local dep
	for dep in $(modinfo -F depends "$VM_MODULE" | tr ',' ' '); do
		[ -d "/sys/module/${dep//-/_}" ] || modprobe "$dep"
	done
	insmod "$VM_MODULE"
}

# out_port: print the device for the command's output: a virtio port, or the console of User-Mode Linux.
out_port() {
	local port name
	if [ -z "$VM_VIRTIO" ]; then
		stty -F /dev/tty0 -opost
		echo /dev/tty0
		return
	fi
	for port in /sys/class/virtio-ports/*; do
		read -r name <"$port/name"
		[ "$name" != out ] || echo "/dev/${port##*/}"
	done
}

# Until this file exists, the host can give up waiting, and boot the guest again.
: >/run/vm/started

# Modules that udev would load on first use.
modprobe -qa loop dm-mod

cd "$VM_CLONE" || exit
if [ -n "$VM_MODULE" ] && ! load_module; then
	echo "vm: the module does not load" >/dev/kmsg
fi
if [ -e /run/vm/cmd ]; then
	# The command writes to a pipe, since the port can be opened only once.
	mkfifo /run/out
	cat /run/out >"$(out_port)" &
	cat=$!
	setsid bash /run/vm/cmd </dev/null >/run/out 2>&1
	status=$?
	# A process left behind may hold the pipe; don't wait for its output.
	for ((i = 0; i < 20; i++)); do
		kill -0 "$cat" 2>/dev/null || break
		sleep 0.05
	done
	echo "$status" >/run/vm/status
else
	stty -F /dev/hvc0 rows "$VM_ROWS" cols "$VM_COLS"
	echo "test VM, kernel $(uname -r); 'exit' ends it" >/dev/hvc0
	busybox setsid -c bash -i </dev/hvc0 >/dev/hvc0 2>&1
	echo 0 >/run/vm/status
fi
