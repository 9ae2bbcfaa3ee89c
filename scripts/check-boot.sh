#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Tests that images are opened at boot: check-boot.sh. A Debian 13 in two layers boots twice, with systemd and Debian's
# kernel: with initramfs-tools and an overlayfs above the image, and with dracut and a dm-snapshot. The last line has
# the numbers of tests that passed, failed and were skipped.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/debian-root.sh"
. "$SCRIPTS/kernel.sh"
. "$SCRIPTS/accel.sh"

WORK=$BUILD/boot
HERE=/usr/share/boot-test

# build_debian DIR: make a minimal Debian with systemd, initramfs-tools and dracut.
build_debian() {
	debian_root "$1" "$SUITE $SUITE-updates" --variant=minbase --format=directory "${NO_DOCS[@]}" \
		--include=systemd-sysv,udev,dmsetup,e2fsprogs,fdisk,kmod,zstd,initramfs-tools,dracut-core,cpio
}

# debian_name: set DEBIAN to the name that the root has in the cache.
debian_name() { DEBIAN=boot-$({ declare -f build_debian && cat "$SCRIPTS/debian-root.sh"; } | short_hash); }

# make_debian: make that root, unless the cache has it.
make_debian() {
	if [ ! -d "$CACHE/$DEBIAN" ] && cache_begin "$DEBIAN"; then
		build_debian "$TMP"
		cache_commit "$DEBIAN"
	fi
	cache_used "$DEBIAN"
}

# stage: collect the files of layer 2: the module, obdsetup with everything that is installed with it, and the test.
stage() {
	local stage=$WORK/srv/stage
	"${SUDO[@]}" rm -rf "$WORK"
	mkdir -p "$WORK/srv/data" "$stage/etc" "$stage/data"/{files,on-part} "$stage$HERE"
	DESTDIR=$stage PREFIX=/usr "$SCRIPTS/install.sh" tools
	rm -rf "$stage/usr/share/man"
	install -D -m 644 -t "$stage/usr/lib/modules/$K_RELEASE/updates" "$BUILD/$K_RELEASE/dm_overlaybd.ko"

	cp -r "$CLONE/Documentation" "$WORK/srv/data/docs"
	"$SCRIPTS/in-root.sh" build/cargo/release/obdsetup create --directory build/boot/srv/data --fs ext4 --size 32m --tar \
		build/boot/srv/data.obd
	cp "$WORK/srv/data.obd" "$stage$HERE/"
	(cd "$WORK/srv/data" && find . -type f -exec sha256sum {} +) >"$stage$HERE/data.sums"
	cat >"$stage/etc/overlaybdtab" <<-END
		# name	layers	options
		system	/dev/disk/by-partlabel/base,/dev/disk/by-partlabel/app	x-initrd.attach
		files	$HERE/data.obd	zfile-opt=cache_blocks\\04016
		on-part	/dev/disk/by-partlabel/data	noauto
	END
	cat >"$stage/etc/fstab" <<-END
		/dev/mapper/files	/data/files	ext4	ro	0	0
		/dev/mapper/on-part	/data/on-part	ext4	ro	0	0
	END
	install -m 755 "$CLONE/tests/boot/guest.sh" "$stage$HERE/"
	echo upper >"$stage/etc/boot-test-layer"
	echo 0123456789abcdef0123456789abcdef >"$stage/etc/machine-id"
	mkdir -p "$stage/etc/systemd/system/multi-user.target.wants"
	cat >"$stage/etc/systemd/system/boot-test.service" <<-END
		[Unit]
		After=multi-user.target
		[Service]
		Type=oneshot
		ExecStart=$HERE/guest.sh
	END
	ln -s ../boot-test.service "$stage/etc/systemd/system/multi-user.target.wants/"

	# Only some of the files, since an emulated CPU is slow; not those that layer 2 replaces. An ordinary user cannot
	# look into all directories.
	(cd "$CACHE/$DEBIAN" && find usr/bin usr/sbin etc -type d ! -perm -005 -prune -o -type f -perm -004 -print) | while read -r file; do
		[ -e "$stage/$file" ] || printf '%s\0' "$file"
	done | (cd "$CACHE/$DEBIAN" && xargs -0 sha256sum) | sed 's,  ,  /,' >"$stage$HERE/root.sums"
}

# build: make the layers, the disk, and both initramfs.
build() {
	stage
	attend "${LONG_SUDO[@]}" unshare --mount --propagation private --pid --fork --kill-child \
		"$0" --in-debian "$(realpath "$CACHE/$DEBIAN")" "$WORK" "$K_DIR" "$K_RELEASE" "$CLONE" "$(id -u):$(id -g)"
	# Files in the tree belong to root. The mounts in it ended with the mount namespace.
	"${SUDO[@]}" rm -rf --one-file-system "$WORK/tree"
}

# in_debian: the second half of build, as root in new namespaces.
in_debian() {
	local debian=$1 work=$2 kernel=$3 release=$4 clone=$5 user=$6 tree=$2/tree
	cp -a --reflink=auto "$debian" "$tree"
	cp -a --reflink=auto "$kernel/lib/modules" "$tree/usr/lib/"
	cp -a --no-preserve=ownership "$work/srv/stage/." "$tree/"
	mount --bind "$debian" "$tree/mnt"
	mount --bind "$work/srv" "$tree/srv"
	mount --rbind /dev "$tree/dev"
	mount -t proc proc "$tree/proc"
	mount -t tmpfs tmpfs "$tree/tmp"
	install -m 755 "$clone/tests/boot/build.sh" "$tree/tmp/"
	chroot "$tree" env -i PATH=/usr/sbin:/usr/bin LANG=C.UTF-8 /tmp/build.sh "$release"
	chown -R "$user" "$work/srv"
}

# boot INITRD ARGS: boot the disk with initrd.INITRD and kernel arguments ARGS. Print the results that the guest
# prints, and two more.
boot() {
	local dir=$WORK/$1
	mkdir -p "$dir"
	VM_RUN=$dir accel
	# The disk discards writes.
	timeout "${TIMEOUT:-580}" "$SCRIPTS/in-root.sh" -k "$K_DIR" qemu-system-x86_64 -machine pc -accel "$VM_ACCEL" -cpu max,la57=off \
		-smp "${QEMU_SMP:-2}" -m "${QEMU_MEM:-1024}" -nodefaults -no-reboot -display none \
		-drive "file=build/boot/srv/disk.img,if=virtio,format=raw,snapshot=on" \
		-kernel /kernel/vmlinuz -initrd "build/boot/srv/initrd.$1" \
		-append "console=ttyS0 panic=-1 oops=panic mitigations=off no_timer_check audit=0 lsm=capability cryptomgr.notests \
systemd.default_device_timeout_sec=400 systemd.default_timeout_start_sec=400 $2" \
		-serial "file:build/boot/$1/console" -serial "file:build/boot/$1/result" || say "# QEMU: status $?"
	tr -d '\r' <"$dir/result"
	tr -d '\r' <"$dir/console" >"$LOGS/console-boot-$1.log"
	if ! grep -q '^end' "$dir/result"; then
		say "not ok - the guest did not come to the end of its tests; $LOGS/console-boot-$1.log:"
		tail -n 30 "$LOGS/console-boot-$1.log" | sed 's/^/# /'
	fi
	if grep -q 'reboot: Power down' "$dir/console"; then
		say "ok - it powers off"
	else
		say "not ok - it powers off"
	fi
	# Failures to stop and unmount at shutdown, after the guest's own tests.
	if grep FAILED "$LOGS/console-boot-$1.log" | sed 's/^/# /' | grep .; then
		say "not ok - systemd reports no failure on the console"
	else
		say "ok - systemd reports no failure on the console"
	fi
}

# boot_overlay: boot with initramfs-tools, and an overlayfs above the image.
boot_overlay() {
	boot initramfs-tools "boot-test=overlay,root root=/dev/mapper/root ro rd.overlaybdtab=no \
rd.overlaybd.store=/dev/disk/by-partlabel/store rd.overlaybd=root,base.obd,app.obd rd.overlaybd.overlay=tmpfs"
}

# boot_snapshot: boot with dracut, and a dm-snapshot above the image.
boot_snapshot() {
	boot dracut "boot-test=snapshot,system root=/dev/mapper/system-rw rw \
rd.overlaybd.snapshot=system,/dev/disk/by-partlabel/cow \
rd.overlaybd=extra,/dev/disk/by-partlabel/data"
}

case ${1:-} in
--in-debian)
	in_debian "${@:2}"
	exit
	;;
--*)
	kernel_select
	debian_name
	"${1#--}"
	exit
	;;
'') ;;
*) die "usage: check-boot.sh" ;;
esac

export USE_ROOT=1 KDIR='' CARGO='' QUIET=1
alone
"$SCRIPTS/setup.sh"
steps 6
step "module" "$SCRIPTS/build-module.sh"
step "obdsetup" "$SCRIPTS/build-tools.sh"
step "Debian $SUITE" "$0" --make_debian
step "layers, disk, initramfs" "$0" --build
results "boot: initramfs-tools, overlayfs" boot_overlay
results "boot: dracut, dm-snapshot" boot_snapshot
results_sum
