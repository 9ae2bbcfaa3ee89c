#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# For dracut(8): what sets up a root file system on an OverlayBD image. Only where it is wanted: a line of
# /etc/overlaybdtab has x-initrd.attach, or with `dracut --add overlaybd`.

# shellcheck source=tools/initramfs/hook-files.sh
. /usr/lib/overlaybd/hook-files.sh

check() {
	# shellcheck disable=SC2046 # words
	require_binaries $(overlaybd_programs) blkid || {
		! overlaybd_wanted || derror "overlaybd: not all is there of:" $(overlaybd_programs) blkid
		return 1
	}
	overlaybd_wanted || return 255
}

depends() {
	echo dm rootfs-block
}

# shellcheck disable=SC2154 # variables are dracut's
installkernel() {
	# shellcheck disable=SC2046 # words
	hostonly='' instmods $(overlaybd_modules)
	modinfo -k "$kernel" dm_overlaybd &>/dev/null || dwarn "overlaybd: kernel $kernel has no module dm_overlaybd"
}

# shellcheck disable=SC2154 # variables are dracut's
install() {
	local program file
	dracut_need_initqueue
	inst_multiple blkid
	for program in $(overlaybd_programs); do
		inst_binary "$program" "/usr/sbin/${program##*/}"
	done
	for file in $(overlaybd_files); do
		inst_simple "$file"
	done
	overlaybd_tab >"$initdir/etc/overlaybdtab"
	inst_hook initqueue/settled 60 "$moddir/attach.sh"
	inst_hook pre-pivot 10 "$moddir/overlay.sh"
}
