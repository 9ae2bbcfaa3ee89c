# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# Where the cached tool-chain roots lie, and how things get into the cache whole or not at all. Sourced.

# A root is keyed by its packages and by the functions that make it.
# shellcheck source=scripts/root-recipe.sh
. "$SCRIPTS/root-recipe.sh"

root_key() { { root_packages && declare -f root_sources build_root; } | short_hash; }
ROOT=$CACHE/root-$(root_key)

# root_mirror: where that came from.
root_mirror() { sed -n "s/^deb \([^ ]*\) $SUITE main\$/\1/p" "$ROOT/etc/apt/sources.list"; }

# A thing is made in a directory of its own, CACHE_TMP, and renamed when whole. Each has its lock: kernels take long.

# cache_begin NAME: lock it, drop what interrupted set-ups left, set TMP to a new directory.
# Returns 1 when $CACHE/NAME has appeared meanwhile.
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

# cache_drop: nothing half made stays.
cache_drop() { "${SUDO[@]}" rm -rf "$CACHE_TMP"; }

# cache_sweep NAME: what killed set-ups left, of NAME, whose lock is ours, and of others.
cache_sweep() {
	local old name
	for old in "$CACHE"/tmp-*/; do
		old=${old%/} name=${old##*/tmp-}
		[ -d "$old" ] || continue
		[ "$name" = "$1" ] || flock -n "$CACHE/lock-$name" true || continue
		"${SUDO[@]}" rm -rf "$old"
	done
}

# cache_commit NAME: what is in $TMP is whole.
cache_commit() {
	sync -f "$CACHE"
	"${SUDO[@]}" mv -T "$TMP" "$CACHE/$1"
	rmdir "$CACHE_TMP"
	trap - EXIT
	unlock
}

# cache_prune NAME: before something new of a kind (the name up to its first dash) is made, remove
# those of its kind that nobody used for two weeks.
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

# cache_used NAME: somebody uses it today.
cache_used() { touch "$CACHE/used-$1"; }
