#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs in a Debian root with the packages under test installed: makes the disk and the initramfs of both boots in
# /srv, where `stage' has the installed files. The unchanged root is at /mnt. build.sh RELEASE
set -euo pipefail

release=$1
cd /srv

# debugfs_of DIR: print commands for debugfs that copy the directory into the file system.
debugfs_of() {
	local path mode
	(cd "$1" && find . -mindepth 1 -printf '%P\n' | sort) | while read -r path; do
		mode=$(stat -c %a "$1/$path")
		if [ -L "$1/$path" ]; then
			echo "symlink \"$path\" $(readlink "$1/$path")"
		elif [ -d "$1/$path" ]; then
			[ -d "/mnt/$path" ] || echo "mkdir \"$path\""
		else
			printf '%s\n' "rm \"$path\"" "write $1/$path \"$path\"" "sif \"$path\" mode 0100$mode"
		fi
	done
}

# Layer 1 is the unchanged root. Layer 2 has the installed files, and a file that shows that the layer is used. Both
# are in a tar wrapper, so that they can be at the start of a larger partition.
obdsetup create --tar --directory /mnt --fs ext4 --size 600m base.obd
obdsetup export --output disk.raw base.obd
debugfs_of /srv/stage >commands
debugfs -w -f commands disk.raw >debugfs.log 2>&1
e2fsck -fn disk.raw
obdsetup create --tar --base base.obd --image disk.raw app.obd
rm disk.raw

# The layers that /etc/overlaybdtab of layer 2 names: see stage in check-boot.sh.
mkdir store
ln base.obd app.obd store/
mke2fs -q -t ext4 -d store store.img 250m
truncate -s 64m cow.img

# part NAME FILE: print a line for sfdisk for a partition that has room for the file, and add the file to `parts'.
parts=()
part() {
	parts+=("$2")
	echo "size=$(($(stat -c %s "$2") / 1048576 + 1))MiB, name=$1"
}
truncate -s 1g disk.img
{
	echo "label: gpt"
	part base base.obd
	part app app.obd
	part data data.obd
	part store store.img
	part cow cow.img
} >parts
# Not in a pipe, because part sets a variable.
sfdisk --quiet disk.img <parts
nth=0
sfdisk --dump disk.img | sed -n 's/.*start= *\([0-9]*\),.*/\1/p' | while read -r start; do
	dd if="${parts[nth]}" of=disk.img bs=512 seek="$start" conv=notrunc,sparse status=none
	nth=$((nth + 1))
done

# Only what this virtual machine needs, because an emulated CPU unpacks it.
depmod "$release"
printf 'MODULES=list\nCOMPRESS=zstd\nCOMPRESSLEVEL=1\n' >/etc/initramfs-tools/conf.d/boot-test
printf '%s\n' virtio_pci virtio_blk >/etc/initramfs-tools/modules

# has FILE: whether an initramfs made by initramfs-tools has obdsetup or the module.
has() { lsinitramfs "$1" | grep -E '(^|/)usr/sbin/obdsetup$|dm_overlaybd'; }

# dracut_wants: whether the project's dracut module asks to be included. Below, dracut is told to include it anyway.
dracut_wants() (
	require_binaries() { type -P "$@" >/dev/null; }
	# shellcheck source=tools/initramfs/dracut/95overlaybd/module-setup.sh
	. /usr/lib/dracut/modules.d/95overlaybd/module-setup.sh
	check
)

# initramfs-tools and dracut leave obdsetup out if nothing needs it. The guests' initramfs need it because of a line in
# /etc/overlaybdtab.
mv /etc/overlaybdtab /tmp/
mkinitramfs -o /tmp/initrd "$release"
! has /tmp/initrd || exit
status=0
dracut_wants || status=$?
[ "$status" = 255 ]
echo OVERLAYBD=y >/etc/initramfs-tools/conf.d/overlaybd
mkinitramfs -o /tmp/initrd "$release"
has /tmp/initrd
rm /etc/initramfs-tools/conf.d/overlaybd
mv /tmp/overlaybdtab /etc/
dracut_wants

mkinitramfs -o initrd.initramfs-tools "$release"
dracut --quiet --no-hostonly --no-hostonly-cmdline --kver "$release" --compress "zstd -1" \
	--modules "systemd systemd-initrd dracut-systemd base udev-rules rootfs-block fs-lib dm overlaybd" \
	--drivers "virtio_pci virtio_blk" --filesystems ext4 initrd.dracut
