#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Second half of in-root.sh, in name spaces of its own: put the mounts together and run the command.
set -euo pipefail

root=$1 clone=$2 cargo=$3 kernel=$4 user=$5 nbinds=$6
shift 6

# bind SRC DST: SRC (a directory or a file) appears at DST of the new root.
bind() {
	if [ -d "$1" ]; then
		mkdir -p "$new$2"
	elif [ ! -e "$new$2" ]; then
		mkdir -p "$(dirname "$new$2")"
		: >"$new$2"
	fi
	mount --bind "$1" "$new$2"
}

# The new root is a tmpfs with the cached root's directories in it, so that nothing is written to that.
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
chmod 1777 "$new/tmp" "$new/root"
mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
mount -t proc proc "$new/proc"
mount --rbind /dev "$new/dev"
[ ! -s /etc/resolv.conf ] || bind /etc/resolv.conf /etc/resolv.conf
[ ! -s /etc/hosts ] || bind /etc/hosts /etc/hosts
[ ! -s "$ca" ] || bind "$ca" /etc/ssl/certs/ca-certificates.crt

bind "$clone" "$clone"
bind "$cargo" /cargo
if [ "$kernel" != - ]; then
	bind "$kernel" /kernel
	[ ! -d "$kernel/lib/modules" ] || bind "$kernel/lib/modules" /usr/lib/modules
fi
for ((i = 0; i < nbinds; i++)); do
	bind "${1%:*}" "${1##*:}"
	shift
done

# Not exec: this shell is process 1 here, and a command that is process 1 ignores signals.
status=0
chroot --userspec="$user" --groups= "$new" /usr/bin/env -C "$clone" "$@" || status=$?
exit "$status"
