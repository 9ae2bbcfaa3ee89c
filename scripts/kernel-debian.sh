# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Makes a kernel directory from Debian's packages. The functions run in the tool-chain root: /srv has apt's lists, and
# /kernel is the directory to fill. Sourced. If the code of build_kernel_debian changes, the kernel directory is made
# again.

set -euo pipefail

# newest_debian_kernel SERIES [SOURCES]: print "RELEASE VERSION GCC RUSTC" of the newest kernel of a series (a regular
# expression) for which image, headers and source are available; nothing if there is none. GCC is the package of its
# compiler, RUSTC the version of the archive's rustc. SOURCES are lines for sources.list, instead of those of the root.
newest_debian_kernel() {
	local series=$1 sources=${2:-} releases release version
	mkdir -p /srv/lists/partial /srv/cache
	printf 'Dir::State::Lists "/srv/lists";\nDir::Cache "/srv/cache";\nAPT::Sandbox::User "";\n' >/srv/apt.conf
	printf 'Acquire::Languages "none";\nAcquire::Retries "2";\nAcquire::http::Timeout "20";\n' >>/srv/apt.conf
	if [ -n "$sources" ]; then
		printf '%s\n' "$sources" >/srv/sources.list
		printf 'Dir::Etc::SourceList "/srv/sources.list";\nDir::Etc::SourceParts "-";\n' >>/srv/apt.conf
	fi
	export APT_CONFIG=/srv/apt.conf
	apt-get -q update -o APT::Update::Error-Mode=any >&2 || return
	releases=$(apt-cache search --names-only "^linux-headers-$series(\\.[0-9]+)?\\+deb[0-9.]+-amd64\$" |
		sed 's/^linux-headers-\([^ ]*\) .*/\1/' | sort -rV)
	for release in $releases; do
		version=$(apt-cache show "linux-headers-$release" | awk '/^Version: / && !n++ { print $2 }')
		apt-cache madison "linux-source-$(echo "$release" | cut -d. -f1,2)" | grep -F " $version " >/dev/null || continue
		apt-cache show "linux-binary-$release" >/dev/null 2>&1 ||
			apt-cache show "linux-image-$release" >/dev/null 2>&1 || continue
		echo "$release $version" \
			"$(apt-cache show "linux-headers-$release" | grep -o '\<gcc-[0-9]*' | head -n 1)" \
			"$(apt-cache madison rustc | awk '!n++ { print $3 }')"
		return
	done
}

# build_kernel_debian RELEASE VERSION: unpack image and modules, and make a tree for modules from the source package.
build_kernel_debian() {
	local release=$1 version=$2 series packages=() p
	series=$(echo "$release" | cut -d. -f1,2)
	export APT_CONFIG=/srv/apt.conf

	echo "== packages of $release"
	mkdir /kernel/debs /kernel/unpacked
	cd /kernel/debs
	for p in image base binary modules headers; do
		! apt-cache show "linux-$p-$release=$version" >/dev/null 2>&1 || packages+=("linux-$p-$release=$version")
	done
	apt-get -q download "${packages[@]}" "linux-source-$series=$version"
	for p in *.deb; do dpkg-deb -x "$p" /kernel/unpacked; done
	rm -r /kernel/debs

	echo "== image and modules"
	cd /kernel/unpacked
	mkdir -p boot /kernel/lib/modules
	for p in usr/lib/modules/"$release" lib/modules/"$release"; do
		[ ! -d "$p" ] || mv "$p" /kernel/lib/modules/
	done
	find boot /kernel/lib/modules -name 'vmlinuz*' -exec mv {} /kernel/vmlinuz \; -quit
	find boot /kernel/lib/modules \( -name "config-$release" -o -path "*/$release/config" \) \
		-exec cp {} /kernel/config \; -quit
	rm -f /kernel/lib/modules/"$release"/{build,source}
	depmod -b /kernel "$release"

	echo "== tree with Rust's metadata"
	mv usr/src/linux-source-"$series".tar.xz /kernel/
	debian_tree "$release" /kernel/linux-source-"$series".tar.xz /kernel/unpacked/usr/src/linux-headers-"$release" /kernel/kdir
	rm -r /kernel/unpacked

	[ -s /kernel/vmlinuz ]
	echo "$release" >/kernel/release
}
