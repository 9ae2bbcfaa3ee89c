# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Makes a tree to build modules with from Debian's source package, for the cache and for DKMS. Sourced. If the code of
# the function changes, kernel directories and the trees of DKMS are made again.

set -euo pipefail

# debian_tree RELEASE SOURCE HEADERS DIR: make the tree DIR from SOURCE, a linux-source-*.tar.xz, and HEADERS, the
# unpacked headers of a kernel. Debian's headers have no Rust metadata; the same compiler makes the same metadata from
# the same source.
debian_tree() {
	local release=$1 source=$2 headers=$3 dir=$4 cc lost args
	mkdir "$dir"
	tar -xf "$source" -C "$dir" --strip-components=1 \
		--exclude='*/Documentation/*/*' --exclude='*/tools/testing/*' \
		--exclude='*/drivers/*.c' --exclude='*/sound/*.c' --exclude='*/drivers/gpu/*.h'
	cp "$headers"/{.config,Module.symvers} "$dir/"
	cd "$dir"
	cc=$(sed -n 's/^CONFIG_CC_VERSION_TEXT="\([^ "]*\).*/\1/p' .config)
	args=("CC=$cc" LOCALVERSION="${release#"$(make -s kernelversion)"}")
	make "${args[@]}" olddefconfig

	# A missing tool, such as pahole, changes the configuration, and so can change types. Versions of tools may differ.
	lost=$(diff <(grep ^CONFIG_ "$headers/.config" | sort) <(grep ^CONFIG_ .config | sort) |
		grep '^[<>]' | grep -vE '_VERSION(_TEXT)?=' || :)
	if [ -n "$lost" ]; then
		printf 'error: not the configuration of %s: %s\n' "$release" "$(echo "$lost" | head -n 4 | paste -sd' ')" >&2
		return 1
	fi

	make -j"$(nproc)" "${args[@]}" modules_prepare
	[ "$(cat include/config/kernel.release)" = "$release" ]
	grep -qx CONFIG_RUST=y .config
	[ -s rust/libkernel.rmeta ] && [ -s rust/libmacros.so ]
}
