# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# Makes a Debian other than the tool-chain root, for tests, with mmdebstrap. Sourced after cache.sh; the keys of what is
# made with it contain this file.

# debian_root TARGET SUITES [NAME=VALUE]... OPTIONS...: run mmdebstrap with the mirror and settings of the tool-chain
# root. SUITES are those of the packages, separated by blanks; the values are in the hooks' environment.
debian_root() {
	local target=$1 name mirror env=() sources=()
	mirror=$(root_mirror)
	for name in $2; do sources+=("deb $mirror $name main"); done
	shift 2
	while [[ $1 =~ ^[A-Z_]+= ]]; do
		env+=("$1")
		shift
	done
	attend "${LONG_SUDO[@]}" env "${env[@]}" unshare --mount --pid --fork --kill-child --mount-proc \
		mmdebstrap --mode=root \
		--aptopt='APT::Install-Recommends "false"' \
		--aptopt="$ROOT/etc/apt/apt.conf.d/99mmdebstrap" \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		"$@" "$SUITE" "$target" "${sources[@]}"
}

# Options that leave out what no test reads.
NO_DOCS=(
	--dpkgopt='path-exclude=/usr/share/doc/*'
	--dpkgopt='path-exclude=/usr/share/locale/*'
	--dpkgopt='path-exclude=/usr/share/man/*'
)
