#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The second half of in-root.sh, in name spaces of its own: makes the mounts and runs the command.
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

# link_clone: make the clone's own path work in the root, unless the root has a file of its own there.
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

# The new root is a tmpfs with the cached root's directories mounted in it, so that nothing is written to the cached
# root.
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
# User-Mode Linux has this root as its own, and runs as the calling user: its guest makes directories in /run and /mnt.
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

# Not exec: the command would be process 1 here, which ignores signals that it doesn't handle. bash reads the whole group
# before running it: this file may change while the command runs.
{
	status=0
	chroot --userspec="$user" --groups= "$new" /usr/bin/env -C "$in_root" "$@" || status=$?
	exit "$status"
}
