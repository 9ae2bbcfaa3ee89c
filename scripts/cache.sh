# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# The cached tool-chain roots, and functions that put things into the cache completely or not at all. Sourced.

# shellcheck source=scripts/root-recipe.sh
. "$SCRIPTS/root-recipe.sh"

# root_key: print the key of the tool-chain root, a hash of its packages and of the functions that make it.
root_key() { { root_packages && declare -f root_sources build_root; } | short_hash; }
ROOT=$CACHE/root-$(root_key)

# root_mirror: print the mirror that the root came from.
root_mirror() { sed -n "s/^deb \([^ ]*\) $SUITE main\$/\1/p" "$ROOT/etc/apt/sources.list"; }

# What debian-image.sh makes.
DEBIAN_IMAGE=$CACHE/image-$(cat "$SCRIPTS"/debian-{image,root}.sh | short_hash)

# A thing is made in a directory of its own, CACHE_TMP, and moved to its place when it is complete. Each thing has its
# own lock, because making a kernel takes long.

# cache_begin NAME: lock NAME, remove what interrupted set-ups have left, and set TMP to the path at which the caller
# makes the thing. If another process has made $CACHE/NAME meanwhile: unlock, and return 1.
cache_begin() {
	CACHE_TMP=$CACHE/tmp-$1
	mkdir -p "$CACHE"
	lock "$CACHE/lock-$1" "set-up of $CACHE/$1"
	if [ -e "$CACHE/$1" ]; then
		unlock
		return 1
	fi
	cache_sweep "$1"
	cache_prune "$1"
	trap cache_drop EXIT
	mkdir -p "$CACHE_TMP"
	TMP=$CACHE_TMP/$1
}

# cache_drop: remove what is incomplete.
cache_drop() { "${SUDO[@]}" rm -rf "$CACHE_TMP"; }

# cache_sweep NAME: remove what killed set-ups have left of NAME, whose lock the caller holds, and of things that nobody
# has locked.
cache_sweep() {
	local old name
	for old in "$CACHE"/tmp-*/; do
		old=${old%/} name=${old##*/tmp-}
		[ -d "$old" ] || continue
		[ "$name" = "$1" ] || flock -n "$CACHE/lock-$name" true || continue
		"${SUDO[@]}" rm -rf "$old"
	done
}

# cache_commit NAME: move the complete $TMP into the cache.
cache_commit() {
	sync -f "$CACHE"
	"${SUDO[@]}" mv -T "$TMP" "$CACHE/$1"
	rmdir "$CACHE_TMP"
	trap - EXIT
	unlock
}

# cache_prune NAME: remove the things of NAME's kind (the name up to its first dash) that weren't used for two weeks.
cache_prune() {
	local old
	for old in "$CACHE/${1%%-*}"-*/; do
		old=${old%/}
		[ -d "$old" ] || continue
		[ -n "$(find "$CACHE/used-${old##*/}" -mtime -14 2>/dev/null)" ] && continue
		say "removing unused $old"
		"${SUDO[@]}" rm -rf "$old"
	done
}

# cache_used NAME: record that NAME is used today.
cache_used() { touch "$CACHE/used-$1"; }
