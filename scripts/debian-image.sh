#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Make a container image of Debian in the cache, unless it is there: debian-image.sh. Needs a mirror. The image has three
# layers: what mmdebstrap makes; one package more; packages and files removed and replaced. In it are
#   layout   the image, an OCI image layout that umoci made, as "latest"
#   tree.tar all files as they were in the end, packed by GNU tar
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/debian-root.sh"

# snapshots DIR: run mmdebstrap, and keep all files in DIR/0.tar, 1.tar and 2.tar.
# shellcheck disable=SC2016 # mmdebstrap's hooks get the root as their $1
snapshots() {
	# Whole seconds, as umoci keeps times.
	local keep="tar --numeric-owner --xattrs --xattrs-include='*' --pax-option='delete=?time' --exclude='./dev/*' \
		--exclude=./proc --exclude=./sys \
		--exclude='./tmp/*' --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' --exclude='./var/log/*' \
		-C \"\$1\" -cf"
	local dir=$1
	debian_root - "$SUITE $SUITE-updates" --variant=apt --format=null "${NO_DOCS[@]}" \
		--include=less \
		--customize-hook="$keep '$dir/0.tar' ." \
		--customize-hook='chroot "$1" apt-get install -y libcap2-bin' \
		--customize-hook="$keep '$dir/1.tar' ." \
		--customize-hook='chroot "$1" setcap cap_net_raw=ep /usr/bin/sed' \
		--customize-hook='chroot "$1" apt-get purge -y less libcap2-bin' \
		--customize-hook='rm -r "$1/usr/share/base-passwd" && ln -s /nowhere "$1/usr/share/base-passwd"' \
		--customize-hook='rm "$1/etc/issue" && mkdir "$1/etc/issue" && echo a file >"$1/etc/issue/file"' \
		--customize-hook='echo another machine >"$1/etc/hostname"' \
		--customize-hook='ln "$1/usr/bin/bash" "$1/usr/bin/the-same-bash"' \
		--customize-hook='chown 1000:1000 "$1/srv" && chmod 1777 "$1/srv"' \
		--customize-hook="$keep '$dir/2.tar' ."
}

# layers ROOT DIR: in new namespaces, make the layout of what snapshots has kept.
layers() {
	local tree=/tmp/bundle/rootfs nth
	mount --bind "$2" "$1/srv"
	mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
	umoci() { chroot "$1" env -i PATH=/usr/bin:/bin umoci "${@:2}"; }
	umoci "$1" init --layout /srv/layout
	umoci "$1" new --image /srv/layout:latest
	umoci "$1" unpack --image /srv/layout:latest /tmp/bundle
	for nth in 0 1 2; do
		find "$1$tree" -mindepth 1 -delete
		tar --numeric-owner --xattrs --xattrs-include='*' --same-owner --same-permissions -C "$1$tree" -xf "$2/$nth.tar"
		umoci "$1" repack --refresh-bundle --image /srv/layout:latest /tmp/bundle
	done
	rm "$2/0.tar" "$2/1.tar"
	mv "$2/2.tar" "$2/tree.tar"
	chmod -R a+rX "$2"
}

if [ "${1:-}" = --layers ]; then
	layers "${@:2}"
	exit
fi
[ $# = 0 ] || die "usage: debian-image.sh"
"$SCRIPTS/make-root.sh"
name=${DEBIAN_IMAGE##*/}
if [ ! -d "$DEBIAN_IMAGE" ] && cache_begin "$name"; then
	mkdir "$TMP"
	snapshots "$TMP"
	attend "${LONG_SUDO[@]}" unshare --mount --propagation private --pid --fork --kill-child \
		"$0" --layers "$ROOT" "$TMP"
	cache_commit "$name"
fi
cache_used "$name"
