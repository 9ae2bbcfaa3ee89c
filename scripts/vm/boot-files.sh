#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs in the tool-chain root: makes DIR/kernel and DIR/initrd, which the VM boots, from the kernel at /kernel and the
# script INIT: boot-files.sh INIT DIR
set -euo pipefail

init=$1 output=$2
mkdir -p "$output"
release=$(cat /kernel/release)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

mkdir -p "$tree"/{bin,modules,proc,sys,dev,lower,upper,root}
cp /bin/busybox "$tree/bin/"
for applet in sh cat ifconfig insmod ln mkdir mount reboot switch_root umount; do
	ln -s busybox "$tree/bin/$applet"
done
install -m 755 "$init" "$tree/init"

# The modules for the root file system, in order and unpacked. Built-in ones are skipped.
for name in 9pnet_virtio 9p overlay dm-mod dm-bufio; do
	modprobe -S "$release" --show-depends "$name" 2>/dev/null || :
done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r file; do
	name=$(basename "$file" | sed 's/\.ko.*/.ko/')
	case $file in
	*.xz) xz -dc "$file" ;;
	*.zst) zstd -qdc "$file" ;;
	*.gz) gzip -dc "$file" ;;
	*) cat "$file" ;;
	esac >"$tree/modules/$name"
	echo "$name"
done >"$tree/order"
mv "$tree/order" "$tree/modules/"

(cd "$tree" && find . | cpio --quiet -o -H newc) >"$output/initrd"

# QEMU can start the unpacked kernel itself (PVH), which saves an emulated CPU two seconds of unpacking.
if grep -qx CONFIG_PVH=y /kernel/config; then
	bash /kernel/kdir/scripts/extract-vmlinux /kernel/vmlinuz >"$output/kernel" 2>/dev/null || rm -f "$output/kernel"
fi
[ -s "$output/kernel" ] || cp /kernel/vmlinuz "$output/kernel"
