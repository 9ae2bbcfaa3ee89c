# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# The recipe of the tool-chain root: a Debian 13 made by mmdebstrap. Sourced; a change makes a new root.

SUITE=trixie

root_packages() { sed 's/#.*//; /^[[:space:]]*$/d' "$SCRIPTS/root-packages"; }

# build_root DIR MIRROR APTCONF: make the root in DIR, with no mount left whatever happens.
# shellcheck disable=SC2016 # mmdebstrap's hooks get the root as their $1
build_root() {
	local dir=$1 mirror=$2 aptconf=$3
	"${SUDO[@]}" setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc \
		mmdebstrap --mode=root --variant=apt --format=directory \
		--aptopt='APT::Install-Recommends "false"' \
		--aptopt="$aptconf" \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		--include="$(root_packages | paste -sd,)" \
		--customize-hook='rm -f "$1/etc/resolv.conf" && : >"$1/etc/resolv.conf"' \
		--customize-hook=': >"$1/etc/hosts"; mkdir -p "$1/usr/lib/modules" "$1/mnt" "$1/srv"' \
		--customize-hook='chroot "$1" dpkg-query -W rustc bindgen gcc-14 libclang-dev >"$1/etc/tool-chain"' \
		"$SUITE" "$dir" \
		"deb $mirror $SUITE main" \
		"deb $mirror $SUITE-updates main" \
		"deb $mirror $SUITE-backports main"
}
