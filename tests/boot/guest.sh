#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs in the guest, from boot-test.service, when the system is up: checks the system, prints the results, and powers
# off. boot-test=TYPE,STACK on the kernel's command line gives the stack of the root file system, and the type of what
# is above it, overlay or snapshot.

here=/usr/share/boot-test
IFS=, read -r type stack <<<"$(sed 's/.*boot-test=\([^ ]*\).*/\1/' /proc/cmdline)"

# check TITLE CMD...: run one test.
check() {
	local title=$1 said
	shift
	if said=$("$@" 2>&1); then
		echo "ok - $title"
	else
		echo "# ${said//$'\n'/$'\n'# }"
		echo "not ok - $title"
	fi
}

# shellcheck disable=SC2317 # check calls this function and those below
root_is() {
	local found
	found=$(findmnt -nro FSTYPE,SOURCE /)
	echo "found: $found"
	[ "$found" = "$1" ]
}

# stack_is NAME TARGETS: the stack has these targets, topmost first, and no target has found a corrupt block.
stack_is() {
	local found
	obdsetup status "$1"
	found=$(obdsetup status --json "$1" | grep -oE '"table": "[0-9]+ [0-9]+ [a-z]+' | sed 's/.* //' | paste -sd' ')
	echo "found: $found"
	[ "$found" = "$2" ] && ! obdsetup status --json "$1" | grep '"state": "C"'
}

# takes_writes: a new file stays, and a deleted file of the lower layer stays deleted.
takes_writes() {
	local text file=/etc/issue.net
	text=$(date +%N)
	grep "  $file\$" "$here/root.sums" && [ -e "$file" ] && echo "$text" >/root/new && rm "$file" && sync &&
		echo 3 >/proc/sys/vm/drop_caches && [ "$(cat /root/new)" = "$text" ] && [ ! -e "$file" ]
}

# entry_is NAME: the unit of this line of overlaybdtab is active, its disk is mounted, and the files are correct.
entry_is() {
	systemctl status "systemd-overlaybdsetup@$(systemd-escape "$1").service"
	systemctl is-active "systemd-overlaybdsetup@$(systemd-escape "$1").service" &&
		[ "$(findmnt -nro SOURCE "/data/$1")" = "/dev/mapper/$1" ] &&
		(cd "/data/$1" && sha256sum --check --quiet "$here/data.sums")
}

# goes NAME: stopping the unit removes the disk; starting the mount unit sets the disk up again.
goes() {
	local unit
	unit=systemd-overlaybdsetup@$(systemd-escape "$1").service
	systemctl stop "data-$(systemd-escape "$1").mount" "$unit" &&
		[ ! -e "/dev/mapper/$1" ] && ! obdsetup status "$1" &&
		systemctl start "data-$(systemd-escape "$1").mount" && entry_is "$1"
}

# initrd_entry_stays: the unit does not start, because the initramfs has already set up the stack.
initrd_entry_stays() {
	local state unit=systemd-overlaybdsetup@system.service
	for state in LoadState=loaded ActiveState=inactive ConditionResult=no; do
		systemctl show -p "${state%=*}" "$unit"
		[ "$(systemctl show -p "${state%=*}" "$unit")" = "$state" ] || return
	done
	# The condition was checked.
	[ "$(systemctl show -P ConditionTimestampMonotonic "$unit")" != 0 ] && obdsetup status system
}

# cow_is_taken: a device with the changes to the root file system isn't used for another image. The message about that
# is printed once.
cow_is_taken() (
	# shellcheck source=tools/initramfs/overlaybd.sh
	. /usr/lib/overlaybd/initramfs.sh
	OVERLAYBD_RUN=/run/snapshot-test
	mkdir "$OVERLAYBD_RUN"
	for _ in 1 2; do
		! overlaybd_snapshot extra,/dev/disk/by-partlabel/cow || exit
	done >/run/snapshot-test/out 2>&1
	cat /run/snapshot-test/out
	[ "$(cat /run/snapshot-test/out)" = "overlaybd: /dev/disk/by-partlabel/cow is in use, and not for extra-rw" ] &&
		[ ! -e /dev/mapper/extra-rw ]
)

# overlay_on_device: rd.overlaybd.overlay=DEVICE. A boot can have only one overlay, so this test calls the function of
# the initramfs in the running system.
overlay_on_device() (
	# shellcheck source=tools/initramfs/overlaybd.sh
	. /usr/lib/overlaybd/initramfs.sh
	OVERLAYBD_RUN=/run/overlay-test
	cow=/dev/disk/by-partlabel/cow
	mkfs.ext4 -q "$cow" && echo "ro rd.overlaybd.overlay=$cow" >/run/cmdline || exit
	mount --bind /run/cmdline /proc/cmdline
	overlaybd_overlay /data/files
	status=$?
	umount /proc/cmdline
	[ "$status" = 0 ] && echo new >/data/files/new && [ -s "$OVERLAYBD_RUN/rw/upper/new" ] &&
		[ "$(findmnt -nro SOURCE "$OVERLAYBD_RUN/rw")" = "$(realpath "$cow")" ] &&
		umount /data/files "$OVERLAYBD_RUN/rw" "$OVERLAYBD_RUN/lower"
)

none_failed() {
	systemctl --failed --no-legend --plain
	[ -z "$(systemctl --failed --no-legend --plain)" ]
}

no_cycle() {
	[ -n "$(journalctl -b --no-pager -n 1)" ] &&
		! journalctl -b --no-pager | grep -iE 'ordering cycle|overlaybdsetup-generator'
}

case $type in
overlay) root='overlay overlay' ;;
snapshot) root="ext4 /dev/mapper/$stack-rw" ;;
esac
{
	check "multi-user.target is reached" systemctl is-active multi-user.target
	check "root file system: $root" root_is "$root"
	check "its stack has two compressed layers" stack_is "$stack" "lsmt zfile zfile"
	check "the upper layer is used" grep -x upper /etc/boot-test-layer
	check "checksums of files of the lower layer" sha256sum --check --quiet "$here/root.sums"
	check "the root file system takes writes" takes_writes
	check "overlaybdtab: files on the root file system" entry_is files
	check "overlaybdtab: device, noauto, pulled in by fstab" entry_is on-part
	check "a unit stops and starts" goes on-part
	case $type in
	overlay)
		# If the initramfs had set up the stack, the unit would not be active.
		check "rd.overlaybdtab=no" systemctl is-active systemd-overlaybdsetup@system.service
		check "an overlayfs on a device" overlay_on_device
		;;
	snapshot)
		check "overlaybdtab: x-initrd.attach" initrd_entry_stays
		check "rd.overlaybd= of a device" stack_is extra "lsmt zfile"
		check "a device takes the changes of one image only" cow_is_taken
		;;
	esac
	check "no unit failed" none_failed
	check "no ordering cycle, no error of the generator" no_cycle
	echo "end"
} >/dev/ttyS1
systemctl poweroff
