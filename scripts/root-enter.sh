#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The second half of in-root.sh, which runs this in new mount and PID namespaces: makes the mounts and runs the command.
set -euo pipefail

root=$1 clone=$2 in_root=$3 cargo=$4 kernel=$5 user=$6 nbinds=$7
shift 7

# bind SRC DST: mount SRC (a directory or a file) at DST of the new root.
bind() {
	if [ -d "$1" ]; then
		mkdir -p "$new$2"
	elif [ ! -e "$new$2" ]; then
		mkdir -p "$(dirname "$new$2")"
		: >"$new$2"
	fi
	mount --bind "$1" "$new$2"
}

# link_clone: make the path that this git clone has on the host valid in the new root, too: a symbolic link to $in_root.
# Do nothing if the new root has something at that path already, or if the path is in a directory of the cached root.
link_clone() {
	local top=${clone#/}
	top=/${top%%/*}
	[ ! -e "$new$clone" ] && [ ! -L "$new$top" ] || return 0
	case $top in
	/usr | /etc | /var | /dev | /proc | /sys | /cargo | /kernel) return ;;
	esac
	mkdir -p "$(dirname "$new$clone")"
	ln -s "$in_root" "$new$clone"
}

# The new root is a tmpfs, with usr, etc and var of the cached root mounted in it. So new mount points and files outside
# of these three don't change the cached root.
ca=$(readlink -f "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" || :)
new=$root/mnt
mount -t tmpfs -o mode=755 tmpfs "$new"
for entry in "$root"/*; do
	name=${entry##*/}
	case $name in
	usr | etc | var) bind "$entry" "/$name" ;;
	*) if [ -L "$entry" ]; then cp -P "$entry" "$new/$name"; else mkdir -p "$new/$name"; fi ;;
	esac
done
# User-Mode Linux uses this root as its root file system, with the rights of the calling user only. Its programs make
# directories in /run and /mnt, so these are writable for all.
chmod 1777 "$new"/{tmp,root,run,mnt}
mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
mount -t proc proc "$new/proc"
mount --rbind /dev "$new/dev"
[ ! -s /etc/resolv.conf ] || bind /etc/resolv.conf /etc/resolv.conf
[ ! -s /etc/hosts ] || bind /etc/hosts /etc/hosts
[ ! -s "$ca" ] || bind "$ca" /etc/ssl/certs/ca-certificates.crt

bind "$clone" "$in_root"
link_clone
bind "$cargo" /cargo
if [ "$kernel" != - ]; then
	bind "$kernel" /kernel
	[ ! -d "$kernel/lib/modules" ] || bind "$kernel/lib/modules" /usr/lib/modules
fi
for ((i = 0; i < nbinds; i++)); do
	bind "${1%:*}" "${1##*:}"
	shift
done

# Not exec: the command would be process 1 of the PID namespace, for which the kernel ignores signals without a handler.
# The braces have bash read all lines up to the closing one before it runs them: this file may change while the command
# runs.
{
	status=0
	chroot --userspec="$user" --groups= "$new" /usr/bin/env -C "$in_root" "$@" || status=$?
	exit "$status"
}
