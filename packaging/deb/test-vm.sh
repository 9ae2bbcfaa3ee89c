#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# shellcheck disable=SC2317 # check calls them
# Tests, in the VM, that the module built by DKMS is loaded by its aliases, by tables and by obdsetup. Prints a line for
# each test.
set -u

failed=0

check() {
	local title=$1
	shift
	if "$@"; then
		echo "ok $title"
	else
		echo "not ok $title"
		failed=1
	fi
}

loaded() { [ -d /sys/module/dm_overlaybd ]; }
unloaded() {
	! loaded || rmmod dm_overlaybd
	! loaded
}

# modprobe finds the package's module, not one that was built in the working tree.
the_package_s() { [[ $(modinfo -n dm_overlaybd) = */updates/dkms/dm_overlaybd.ko* ]]; }

by_alias() { unloaded && modprobe "$1" && loaded; }

# by_table TARGET: creating a device loads the module. The creation fails, because the table names no device; but
# device-mapper looks up the target type first.
by_table() {
	unloaded || return
	dmsetup create none --readonly --table "0 8 $1 none" 2>/dev/null
	loaded
}

by_obdsetup() {
	unloaded || return
	head -c 1M /dev/urandom >/tmp/disk
	/mnt/share/obdsetup create --image /tmp/disk /tmp/layer.obd &&
		/mnt/share/obdsetup open packaged /tmp/layer.obd &&
		cmp /tmp/disk /dev/mapper/packaged &&
		/mnt/share/obdsetup close packaged &&
		unloaded
}

cp -r /mnt/share/modules/. "/usr/lib/modules/$(uname -r)/" || exit
check "modinfo finds the module of the package" the_package_s
check "modprobe dm-zfile" by_alias dm-zfile
check "modprobe dm-lsmt" by_alias dm-lsmt
check "dmsetup create: zfile loads it" by_table zfile
check "dmsetup create: lsmt loads it" by_table lsmt
check "obdsetup open loads it, and reads what was written" by_obdsetup
exit "$failed"
