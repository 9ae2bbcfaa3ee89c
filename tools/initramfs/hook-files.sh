# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
# What an initramfs needs for OverlayBD images: what the hooks of initramfs-tools and of dracut have in common. Sourced.

# overlaybd_tab: the lines of /etc/overlaybdtab for the initramfs.
overlaybd_tab() {
	[ ! -e /etc/overlaybdtab ] || grep -E '^[^#]*[[:space:],]x-initrd\.attach(,|[[:space:]]|$)' /etc/overlaybdtab
}

overlaybd_wanted() { [ -n "$(overlaybd_tab)" ]; }

# overlaybd_programs: they may be where PATH does not look.
overlaybd_programs() {
	for overlaybd_file in /usr/local/sbin/obdsetup /usr/sbin/obdsetup; do
		[ ! -x "$overlaybd_file" ] || {
			echo "$overlaybd_file"
			break
		}
	done
	echo /usr/sbin/dmsetup
}

overlaybd_files() {
	echo /usr/lib/overlaybd/initramfs.sh
	for overlaybd_file in /usr/lib/udev/rules.d/*overlaybd*.rules; do
		[ ! -e "$overlaybd_file" ] || echo "$overlaybd_file"
	done
}

# overlaybd_modules: with the file systems that images are likely to have.
overlaybd_modules() { echo dm_overlaybd dm_snapshot loop overlay ext4 erofs; }
