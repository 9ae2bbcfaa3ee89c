# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Makes tool-chain roots with mmdebstrap: a Debian 13 with everything, and for a kernel of another suite a root of that
# suite, with the tools that build modules. Sourced. If the code of root_sources or build_root changes, roots are made
# again.

SUITE=trixie

# root_packages: print the packages of the tool-chain root, one per line.
root_packages() { sed 's/#.*//; /^[[:space:]]*$/d' "$SCRIPTS/root-packages"; }

# module_packages GCC: print the packages in the list's part "the module", with GCC for its gcc.
module_packages() { sed -n '/^# the module/,/^$/p' "$SCRIPTS/root-packages" | sed "/^#/d; /^\$/d; s/^gcc-.*/$1/"; }

# root_sources SUITE MIRROR: print lines for sources.list. A mirror's copy of another suite than trixie may be older
# than apt accepts by default.
root_sources() {
	case $1 in
	"$SUITE") printf "deb $2 %s main\n" "$1" "$1-updates" "$1-backports" ;;
	*) echo "deb [check-valid-until=no] $2 $1 main" ;;
	esac
}

# build_root DIR SUITE MIRROR PACKAGES APTCONF: make the root in DIR. No mounts are left, also if this fails.
# shellcheck disable=SC2016 # mmdebstrap's hooks get the root as their $1
build_root() {
	local dir=$1 suite=$2 mirror=$3 packages=$4 aptconf=$5 gcc sources
	gcc=$(grep -x 'gcc-[0-9]*' <<<"$packages")
	mapfile -t sources < <(root_sources "$suite" "$mirror")
	"${SUDO[@]}" setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc \
		mmdebstrap --mode=root --variant=apt --format=directory \
		--aptopt='APT::Install-Recommends "false"' \
		--aptopt="$aptconf" \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		--include="$(paste -sd, <<<"$packages")" \
		--customize-hook='rm -f "$1/etc/resolv.conf" && : >"$1/etc/resolv.conf"' \
		--customize-hook=': >"$1/etc/hosts"; mkdir -p "$1/usr/lib/modules" "$1/mnt" "$1/srv"' \
		--customize-hook='chroot "$1" dpkg-query -W rustc bindgen '"$gcc"' libclang-dev >"$1/etc/tool-chain"' \
		"$suite" "$dir" "${sources[@]}"
}
