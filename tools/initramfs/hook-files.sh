# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
# What an initramfs needs for OverlayBD images: what the hooks of initramfs-tools and of dracut have in common. Sourced.

# overlaybd_tab: the lines of /etc/overlaybdtab for the initramfs.
overlaybd_tab() {
	[ ! -e /etc/overlaybdtab ] ||
		LC_ALL=C grep -aE '^[[:space:]]*[^#[:space:]].*[[:space:],]x-initrd\.attach(,|[[:space:]]|$)' /etc/overlaybdtab
}

overlaybd_wanted() { [ -n "$(overlaybd_tab)" ]; }

# overlaybd_programs: obdsetup may be where PATH does not look; the generator is a link to it.
overlaybd_programs() {
	readlink -f /usr/lib/systemd/system-generators/systemd-overlaybdsetup-generator
	echo /usr/sbin/dmsetup
	case $(overlaybd_tab) in
	*[[:space:],]partitions*) command -v partx || echo /usr/bin/partx ;;
	esac
}

overlaybd_files() {
	echo /usr/lib/overlaybd/initramfs.sh
	for overlaybd_file in /usr/lib/udev/rules.d/*overlaybd*.rules; do
		[ ! -e "$overlaybd_file" ] || echo "$overlaybd_file"
	done
}

# overlaybd_modules: with the file systems that images are likely to have.
overlaybd_modules() { echo dm_overlaybd dm_snapshot loop overlay ext4 erofs; }
