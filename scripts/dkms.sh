#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# DKMS runs this from its own copy of the source, in /usr/src: dkms.sh check|build RELEASE [KDIR]. If no Rust module can
# be built for that kernel, it prints the reason in one line. If the headers have no Rust metadata, "build" first makes
# a kernel tree with metadata, in TREES, once for each kernel.

# Unset all variables but PATH, TERM and TMPDIR: those that DKMS was called with, such as RUSTC, ARCH, KCFLAGS and
# MAKEFLAGS, must not affect the build.
for name in $(compgen -e); do
	case $name in
	PATH | TERM | TMPDIR) ;;
	*) unset "$name" ;;
	esac
done
export HOME=/root LANG=C.UTF-8
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/kdir-check.sh"
. "$SCRIPTS/kernel-tree.sh"

# Use the distribution's rustc, not one that the user root has installed, such as ~/.cargo/bin/rustc.
PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH

TREES=/var/cache/dm-overlaybd

what=${1:-} release=${2:-}
[[ $what =~ ^(check|build)$ && -n $release ]] || die "usage: dkms.sh check|build RELEASE [KDIR]"
kdir=${3:-/lib/modules/$release/build}
tree=$TREES/$release

# impossible REASON...: print why no module can be built, and exit with 1.
impossible() {
	warn "dm-overlaybd: cannot build for $release: $*"
	exit 1
}

# version PACKAGE: print the version of the source package that an installed package was built from; nothing if PACKAGE
# is not installed.
version() { dpkg-query -W -f '${source:Version}' "$1" 2>/dev/null || :; }

# made_with: print names and versions of the packages that a tree is made with. If one changes, the tree no longer fits.
made_with() { dpkg-query -W "linux-headers-$release" rustc rust-src bindgen 2>/dev/null || :; }

# recipe: print a hash of the functions that make a tree.
recipe() { declare -f debian_tree thin | short_hash; }

# tree_is_there: whether there is a complete tree, made by these functions with these packages. The file made-of has
# both, and is written last.
tree_is_there() { [ "$(cat "$tree/made-of" 2>/dev/null)" = "$(made_with && recipe)" ]; }

# tree_fits: whether there is a complete tree, made with these packages, perhaps by an older version of the functions.
tree_fits() { [ -s "$tree/made-of" ] && [ "$(sed '$d' "$tree/made-of")" = "$(made_with)" ]; }

# find_source: set SOURCE to the archive that a tree is made from, which must have the version of the headers. If there
# is none, fail, with the reason in LACK. On Ubuntu there is none: its packages linux-lib-rust have the metadata.
find_source() {
	local package want have newer=
	want=$(version "linux-headers-$release")
	LACK=$KDIR_NO_METADATA
	[ -n "$want" ] || return
	if dpkg-vendor --derives-from Ubuntu; then
		LACK+=": apt install linux-lib-rust-$release"
		return 1
	fi
	package=linux-source-$(cut -d. -f1,2 <<<"$release")
	SOURCE=/usr/src/$package.tar.xz
	have=$([ ! -f "$SOURCE" ] || version "$package")
	[ "$have" != "$want" ] || return 0
	# If a newer source is installed, the archive may no longer have the one for this kernel.
	[ -z "$have" ] || ! dpkg --compare-versions "$have" gt "$want" || newer=", or boot the newer kernel"
	LACK="Debian's headers have no Rust metadata, it is made from the source${have:+, which is $have here}:"
	LACK+=" apt install $package=$want$newer"
	return 1
}

# find_tree: check that there is a tree, or the source to make one; else print the reason and exit. If only the source
# of another kernel is installed, a tree that older functions made is used.
find_tree() { tree_is_there || find_source || tree_fits || impossible "$LACK"; }

# thin DIR: delete everything in the tree DIR that is not needed to build modules.
thin() {
	local arch
	find "$1" -mindepth 1 -maxdepth 1 ! -name .config ! -name Makefile ! -name Module.symvers ! -name arch \
		! -name include ! -name rust ! -name scripts ! -name tools -exec rm -r {} +
	for arch in "$1"/arch/*/; do [ -d "$arch/include/generated" ] || rm -r "$arch"; done
	find "$1"/tools -mindepth 1 -maxdepth 1 ! -name bpf ! -name objtool ! -name scripts -exec rm -r {} +
	find "$1"/{arch,rust,tools} -type f \( -name '*.[coS]' -o -name '*.a' \) -delete
}

# make_tree: make the tree, unless a usable tree exists. Before making it, remove the trees of kernels whose headers are
# gone.
make_tree() {
	local old
	lock "$TREES/lock" "set-up in $TREES"
	! tree_is_there || return 0
	if ! find_source && tree_fits; then
		say "using $tree, which an older version of dm-overlaybd made"
		return
	fi
	for old in "$TREES"/*/; do
		[ -e "/lib/modules/$(basename "$old")/build" ] || rm -rf "$old"
	done
	rm -rf "$tree"
	say "making $tree, a tree with Rust's metadata, once for this kernel"
	trap 'rm -rf "$tree"' EXIT
	(
		set -E
		trap 'warn "error: $tree: this failed: $BASH_COMMAND"' ERR
		debian_tree "$release" "$SOURCE" "$(realpath "$kdir")" "$tree"
	)
	thin "$tree"
	{ made_with && recipe; } >"$tree/made-of"
	trap - EXIT
}

[ -d "$kdir" ] || impossible "no headers ($kdir): install those of this kernel, linux-headers-$release with Debian"
problems=$(kdir_problems "$kdir")
if [ "$problems" = "$KDIR_NO_METADATA" ]; then
	find_tree
	[ "$what" = build ] || exit 0
	make_tree
	kdir=$tree
	problems=$(kdir_problems "$kdir")
fi
[ -z "$problems" ] || impossible "$problems"
[ "$what" = build ] || exit 0

kdir_compiler "$kdir"
make -C "$kdir" "M=$CLONE" "${KDIR_ARGS[@]}" "-j$(nproc)" --no-print-directory modules
