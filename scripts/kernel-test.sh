# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Makes kernels for tests: Debian's source, a small configuration, and checkers. Built with clang, which KASAN needs
# in combination with Rust. Sourced. If the code of the function changes, the kernel directories are made again.

set -euo pipefail

# build_kernel_test RELEASE VERSION CONFIG...: fill /kernel, as build_kernel_debian does, with a kernel that has the
# options in the files CONFIG, and else as few as possible. Fails if an option is not possible.
build_kernel_test() {
	local release=$1 version=$2 series line missing=0
	shift 2
	series=$(echo "$release" | cut -d. -f1,2)
	export APT_CONFIG=/srv/apt.conf

	echo "== source of $version"
	mkdir /kernel/deb /kernel/kdir
	(cd /kernel/deb && apt-get -q download "linux-source-$series=$version")
	dpkg-deb --fsys-tarfile /kernel/deb/*.deb | tar -xO --wildcards '*/linux-source-*.tar.xz' |
		xz -dc | tar -x -C /kernel/kdir --strip-components=1 --exclude='*/Documentation/*/*' --exclude='*/drivers/gpu/*.h'
	rm -r /kernel/deb

	echo "== configuration"
	cd /kernel/kdir
	local args=(LLVM=1 LOCALVERSION="${release#"$(make -s kernelversion)"}")
	cat "$@" >/kernel/wanted
	make "${args[@]}" KCONFIG_ALLCONFIG=/kernel/wanted allnoconfig
	while read -r line; do
		grep -qxF "$line" .config && continue
		echo "not possible: $line"
		missing=1
	done < <(grep CONFIG_ /kernel/wanted)
	[ "$missing" = 0 ]
	if grep -qx CONFIG_KCSAN=y .config; then
		# C and Rust use the same runtime of KCSAN, but the kernel doesn't enable KCSAN for Rust yet.
		sed -i 's/"supported-sanitizers", \["kcfi", /&"thread", /' scripts/generate_rust_target.rs
		grep -q '"kcfi", "thread"' scripts/generate_rust_target.rs
		echo "-Zsanitizer=thread -Cllvm-args=-tsan-distinguish-volatile=1" \
			"-Cllvm-args=-tsan-instrument-func-entry-exit=0" >/kernel/rustflags
	else
		echo kasan_multi_shot page_poison=1 page_owner=on >/kernel/cmdline
		echo 3072 >/kernel/memory
	fi

	echo "== kernel and modules"
	make -j"$(nproc)" "${args[@]}" bzImage modules
	cp "$(make -s "${args[@]}" image_name)" /kernel/vmlinuz
	make -s "${args[@]}" INSTALL_MOD_PATH=/kernel DEPMOD=true modules_install
	rm -f /kernel/lib/modules/"$release"/build
	depmod -b /kernel "$release"
	cp .config /kernel/config

	# Building modules only needs headers, scripts and metadata.
	find . \( -name '*.o' -o -name '*.a' -o -name '*.ko' -o -name 'vmlinux*' -o -name '.tmp_*' -o -name '.*.cmd' \) \
		! -path './scripts/*' ! -path './tools/*' -type f -delete
	find drivers sound fs net mm -name '*.c' -delete
	[ "$(cat include/config/kernel.release)" = "$release" ]
	[ -s rust/libkernel.rmeta ] && [ -s rust/libmacros.so ] && [ -s Module.symvers ]
	echo "$release" >/kernel/release
}
