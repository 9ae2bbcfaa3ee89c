# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
# A root file system on an OverlayBD image: what the hooks of initramfs-tools and of dracut have in common. The kernel's
# command line and /etc/overlaybdtab say what to do: see boot.rst. Sourced, in an initramfs that may have little more
# than a shell, cat, mkdir, mount, blkid, modprobe, dmsetup and obdsetup.

# At shutdown, systemd does not unmount what is mounted below /run/initramfs.
OVERLAYBD_RUN=/run/initramfs/overlaybd

# overlaybd_say TEXT: print TEXT on the console, unless it was printed before: failed steps are tried again and again.
# Does not use grep, which the initramfs may lack.
overlaybd_say() {
	overlaybd_said=$(cat "$OVERLAYBD_RUN/said" 2>/dev/null)
	case "
$overlaybd_said
" in
	*"
overlaybd: $1
"*) return ;;
	esac
	echo "overlaybd: $1" >>"$OVERLAYBD_RUN/said"
	echo "overlaybd: $1" >&2
}

# overlaybd_try CMD...: run a command; if it fails, print its error.
overlaybd_try() {
	overlaybd_error=$("$@" 2>&1 >/dev/null) && return
	overlaybd_say "$overlaybd_error"
	return 1
}

# overlaybd_there DEVICE FOR: return whether DEVICE exists; if not, print that FOR needs it. DEVICE may appear later.
overlaybd_there() {
	[ ! -b "$1" ] || return 0
	overlaybd_say "no block device $1, for $2"
	return 1
}

# overlaybd_fstype DEVICE: print the type of the file system on DEVICE.
overlaybd_fstype() { blkid -o value -s TYPE "$1"; }

# overlaybd_store DEVICE: mount the file system on DEVICE, in which the layers with relative names are. This is not a
# store of changes.
overlaybd_store() {
	[ ! -e "$OVERLAYBD_RUN/store-mounted" ] || return 0
	overlaybd_there "$1" rd.overlaybd.store= || return
	mkdir -p "$OVERLAYBD_RUN/store"
	overlaybd_try mount -r -t "$(overlaybd_fstype "$1")" "$1" "$OVERLAYBD_RUN/store" &&
		: >"$OVERLAYBD_RUN/store-mounted"
}

# overlaybd_open NAME[,LAYER...]: open a stack, if it is not open; without layers, those of its line in
# /etc/overlaybdtab.
overlaybd_open() {
	overlaybd_ifs=$IFS
	IFS=,
	# shellcheck disable=SC2086 # commas separate
	set -- $1
	IFS=$overlaybd_ifs
	overlaybd_name=$1
	[ ! -e "/dev/mapper/$overlaybd_name" ] || return 0
	shift
	for overlaybd_layer; do
		shift
		case $overlaybd_layer in
		/*) set -- "$@" "$overlaybd_layer" ;;
		*) set -- "$@" "$OVERLAYBD_RUN/store/$overlaybd_layer" ;;
		esac
	done
	modprobe -qa loop dm_overlaybd
	overlaybd_try obdsetup open -- "$overlaybd_name" "$@"
}

# overlaybd_snapshot NAME,DEVICE: make /dev/mapper/NAME-rw, which keeps changes on the device.
overlaybd_snapshot() {
	overlaybd_name=${1%%,*}
	[ ! -e "/dev/mapper/$overlaybd_name-rw" ] || return 0
	overlaybd_cow=${1#*,}
	overlaybd_there "/dev/mapper/$overlaybd_name" "$overlaybd_name-rw" || return
	overlaybd_there "$overlaybd_cow" "$overlaybd_name-rw" || return
	# Another snapshot may have the device: the kernel lets two snapshots write to one device.
	for overlaybd_holder in /sys/class/block/*/holders/*; do
		[ -e "$overlaybd_holder" ] || continue
		overlaybd_block=${overlaybd_holder%/holders/*}
		# shellcheck disable=SC3013 # all have it: dash, bash, busybox
		[ ! "/dev/${overlaybd_block##*/}" -ef "$overlaybd_cow" ] || {
			overlaybd_say "$overlaybd_cow is in use, and not for $overlaybd_name-rw"
			return 1
		}
	done
	modprobe -q dm_snapshot
	# The table has one line, "0 SECTORS lsmt ...".
	overlaybd_sectors=$(dmsetup table "$overlaybd_name") || return
	overlaybd_sectors=${overlaybd_sectors#0 }
	overlaybd_try dmsetup create "$overlaybd_name-rw" --uuid "OVERLAYBD-SNAPSHOT-$overlaybd_name" --table \
		"0 ${overlaybd_sectors%% *} snapshot /dev/mapper/$overlaybd_name $overlaybd_cow P 8"
}

# overlaybd_attach: open the stacks and snapshots of the command line and the table. Devices of some may appear later,
# so this is called again until the root device exists.
overlaybd_attach() {
	mkdir -p "$OVERLAYBD_RUN"
	overlaybd_tab=1
	read -r overlaybd_words </proc/cmdline
	for overlaybd_word in $overlaybd_words; do
		case $overlaybd_word in
		rd.overlaybdtab=no | rd.overlaybdtab=0) overlaybd_tab= ;;
		rd.overlaybd.store=*) overlaybd_store "${overlaybd_word#*=}" ;;
		esac
	done
	for overlaybd_word in $overlaybd_words; do
		case $overlaybd_word in
		rd.overlaybd=*) overlaybd_open "${overlaybd_word#*=}" ;;
		esac
	done
	if [ -n "$overlaybd_tab" ] && [ -e /etc/overlaybdtab ]; then
		while read -r overlaybd_word _; do
			case $overlaybd_word in
			'' | '#'*) ;;
			*) overlaybd_open "$overlaybd_word" ;;
			esac
		done </etc/overlaybdtab
	fi
	for overlaybd_word in $overlaybd_words; do
		case $overlaybd_word in
		rd.overlaybd.snapshot=*) overlaybd_snapshot "${overlaybd_word#*=}" ;;
		esac
	done
}

# overlaybd_overlay DIR: if rd.overlaybd.overlay= is given, mount an overlayfs on DIR, the root file system, for writes.
overlaybd_overlay() {
	overlaybd_upper=
	read -r overlaybd_words </proc/cmdline
	for overlaybd_word in $overlaybd_words; do
		case $overlaybd_word in
		rd.overlaybd.overlay=*) overlaybd_upper=${overlaybd_word#*=} ;;
		esac
	done
	[ -n "$overlaybd_upper" ] || return 0
	modprobe -q overlay
	mkdir -p "$OVERLAYBD_RUN/lower" "$OVERLAYBD_RUN/rw"
	case $overlaybd_upper in
	tmpfs) mount -t tmpfs -o mode=0755 tmpfs "$OVERLAYBD_RUN/rw" ;;
	*) mount -t "$(overlaybd_fstype "$overlaybd_upper")" "$overlaybd_upper" "$OVERLAYBD_RUN/rw" ;;
	esac &&
		mkdir -p "$OVERLAYBD_RUN/rw/upper" "$OVERLAYBD_RUN/rw/work" &&
		mount -o bind "$1" "$OVERLAYBD_RUN/lower" &&
		mount -t overlay -o "lowerdir=$OVERLAYBD_RUN/lower,upperdir=$OVERLAYBD_RUN/rw/upper,workdir=$OVERLAYBD_RUN/rw/work" \
			overlay "$1"
}
