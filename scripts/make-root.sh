#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Makes the tool-chain root in the cache, unless it exists: make-root.sh [kernel]. With "kernel", the root that
# modules for the selected kernel are built in, if it is not the tool-chain root.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"

# The new root doesn't have the directory that TMPDIR names on this machine.
unset TMPDIR
root=$ROOT suite=$SUITE
include=$(root_packages)
if [ "${1:-}" = kernel ]; then
	. "$SCRIPTS/kernel.sh"
	kernel_look_up
	[ "$K_ROOT" = "$ROOT" ] || root=$K_ROOT suite=$K_SUITE include=$(module_packages "$K_GCC")
fi
[ -d "$root" ] && cache_used "${root##*/}" && exit

# host_apt_conf FILE: write apt's settings of this machine for proxies, and for checks of dates, to FILE: the root uses
# the same network and clock.
host_apt_conf() {
	apt-config dump 2>/dev/null | grep -E '^Acquire::(https?::([^ ]*::)?Proxy|Check-(Valid-Until|Date)) ' >"$1" || :
}

# host_mirror: print the first Debian mirror in this machine's settings that has the suite's backports; nothing if there
# is none.
host_mirror() {
	local uri probe=$CACHE_TMP/probe
	# shellcheck disable=SC2016 # apt's own $
	apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
		sed -n 's,^Debian|Debian|\(https\?://[^|]*[^/|]\)/*$,\1,p' | sort -u |
		while read -r uri; do
			/usr/lib/apt/apt-helper -o Acquire::Retries=0 -o Acquire::http::Timeout=10 \
				download-file "$uri/dists/$SUITE-backports/InRelease" "$probe" >/dev/null 2>&1 || continue
			say "$uri"
			break
		done
	rm -f "$probe"
}

# need_mmdebstrap: install mmdebstrap and the keys of the Debian archive on this machine, unless they are there.
need_mmdebstrap() {
	command -v mmdebstrap >/dev/null && [ -s /usr/share/keyrings/debian-archive-keyring.gpg ] && return
	command -v apt-get >/dev/null ||
		die "this machine has no mmdebstrap, or no /usr/share/keyrings/debian-archive-keyring.gpg: install both"
	say "== installing mmdebstrap on this machine"
	"${SUDO[@]}" apt-get update
	"${SUDO[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
		mmdebstrap debian-archive-keyring
}

cache_begin "${root##*/}" || exit 0
need_mmdebstrap
mirror=${MIRROR:-}
if [ -z "$mirror" ] && [ "$root" = "$ROOT" ]; then
	mirror=$(host_mirror)
elif [ -z "$mirror" ]; then
	mirror=$(root_mirror)
fi
mirror=${mirror:-http://deb.debian.org/debian}
say "== Debian $suite from $mirror"
host_apt_conf "$CACHE_TMP/apt.conf"
short=("${SUDO[@]}")
# build_root runs commands with SUDO that take long: end them with this process.
attend_root() { SUDO=("${short[@]}") && attend "${LONG_SUDO[@]}" "$@"; }
SUDO=(attend_root)
build_root "$TMP" "$suite" "$mirror" "$include" "$CACHE_TMP/apt.conf"
SUDO=("${short[@]}")
"${SUDO[@]}" rm "$CACHE_TMP/apt.conf"
cache_commit "${root##*/}"
cache_used "${root##*/}"
