#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# What DKMS calls, from its own copy of the source: dkms.sh check|build RELEASE [KDIR]. Where a Rust module cannot be built
# for that kernel, it says why in one line. Where headers have no Rust metadata, build makes a tree that has, once.
export HOME="${HOME:-/root}"
unset MAKEFLAGS MAKELEVEL KERNELRELEASE
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/kdir-check.sh"
. "$SCRIPTS/kernel-tree.sh"

# The distribution's rustc before root's own.
PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH

TREES=/var/cache/dm-overlaybd

what=${1:-} release=${2:-}
[[ $what =~ ^(check|build)$ && -n $release ]] || die "usage: dkms.sh check|build RELEASE [KDIR]"
kdir=${3:-/lib/modules/$release/build}
tree=$TREES/$release

impossible() { die "cannot build for $release: $*"; }

# version PACKAGE: of a Debian package, nothing if it is not installed.
version() { dpkg-query -W -f '${Version}' "$1" 2>/dev/null || :; }

# made_of: all that a tree is made of.
made_of() {
	dpkg-query -W "linux-headers-$release" rustc rust-src bindgen 2>/dev/null || :
	declare -f debian_tree thin | short_hash
}

# tree_is_there: whole, that is. The file is written last.
tree_is_there() { [ "$(cat "$tree/made-of" 2>/dev/null)" = "$(made_of)" ]; }

# find_source: set SOURCE to the archive that a tree is made from, of the same version as the headers.
find_source() {
	local package want have
	want=$(version "linux-headers-$release")
	[ -n "$want" ] || impossible "$KDIR_NO_METADATA"
	! dpkg-vendor --derives-from Ubuntu || impossible "$KDIR_NO_METADATA: apt install linux-lib-rust-$release"
	package=linux-source-$(cut -d. -f1,2 <<<"$release")
	SOURCE=/usr/src/$package.tar.xz
	have=$([ ! -f "$SOURCE" ] || version "$package")
	[ "$have" = "$want" ] ||
		impossible "Debian's headers have no Rust metadata, it is made from the source${have:+, which is $have here}:" \
			"apt install $package=$want"
}

# thin DIR: leave what modules are built with.
thin() {
	local arch
	find "$1" -mindepth 1 -maxdepth 1 ! -name .config ! -name Makefile ! -name Module.symvers ! -name arch \
		! -name include ! -name rust ! -name scripts ! -name tools -exec rm -r {} +
	for arch in "$1"/arch/*/; do [ -d "$arch/include/generated" ] || rm -r "$arch"; done
	find "$1"/tools -mindepth 1 -maxdepth 1 ! -name bpf ! -name objtool ! -name scripts -exec rm -r {} +
	find "$1"/{arch,rust,tools} -type f \( -name '*.[coS]' -o -name '*.a' \) -delete
}

# make_tree: and remove those of kernels that are gone.
make_tree() {
	local old
	lock "$TREES/lock" "set-up in $TREES"
	! tree_is_there || return 0
	for old in "$TREES"/*/; do
		[ -e "/lib/modules/$(basename "$old")/build" ] || rm -rf "$old"
	done
	rm -rf "$tree"
	say "making $tree, a tree with Rust's metadata, once for this kernel"
	trap 'rm -rf "$tree"' EXIT
	(debian_tree "$release" "$SOURCE" "$(realpath "$kdir")" "$tree")
	thin "$tree"
	made_of >"$tree/made-of"
	trap - EXIT
}

[ -d "$kdir" ] || impossible "no headers ($kdir): install those of this kernel, linux-headers-$release with Debian"
problems=$(kdir_problems "$kdir")
if [ "$problems" = "$KDIR_NO_METADATA" ]; then
	tree_is_there || find_source
	[ "$what" = build ] || exit 0
	tree_is_there || make_tree
	kdir=$tree
	problems=$(kdir_problems "$kdir")
fi
[ -z "$problems" ] || impossible "$problems"
[ "$what" = build ] || exit 0

kdir_compiler "$kdir"
make -C "$kdir" "M=$CLONE" "${KDIR_ARGS[@]}" "-j$(nproc)" --no-print-directory modules
