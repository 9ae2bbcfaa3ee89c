# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Makes kernels for benchmarks: User-Mode Linux from Debian's source. It is a process, so it computes as fast as the
# machine, with or without virtualization. Sourced; a change makes a new directory.

set -euo pipefail

# build_kernel_uml RELEASE VERSION FILE...: like build_kernel_debian, with the default configuration. A FILE with the
# suffix .patch is applied to the source; any other is appended to the configuration.
build_kernel_uml() {
	local release=$1 version=$2 series line file missing=0 configs=() patches=()
	shift 2
	for file; do
		case $file in
		*.patch) patches+=("$file") ;;
		*) configs+=("$file") ;;
		esac
	done
	series=$(echo "$release" | cut -d. -f1,2)
	export APT_CONFIG=/srv/apt.conf

	echo "== source of $version"
	mkdir /kernel/deb /kernel/kdir
	(cd /kernel/deb && apt-get -q download "linux-source-$series=$version")
	dpkg-deb --fsys-tarfile /kernel/deb/*.deb | tar -xO --wildcards '*/linux-source-*.tar.xz' |
		xz -dc | tar -x -C /kernel/kdir --strip-components=1 --exclude='*/Documentation/*/*' --exclude='*/drivers/gpu/*.h'
	rm -r /kernel/deb

	cd /kernel/kdir
	for file in "${patches[@]}"; do
		echo "== ${file##*/}"
		patch -p1 --fuzz=0 <"$file"
	done

	echo "== configuration"
	local args=(ARCH=um CC=x86_64-linux-gnu-gcc-14 LOCALVERSION="${release#"$(make -s kernelversion)"}")
	cat "${configs[@]}" >/kernel/wanted
	make "${args[@]}" defconfig
	cat /kernel/wanted >>.config
	make "${args[@]}" olddefconfig
	while read -r line; do
		grep -qxF "$line" .config && continue
		echo "not possible: $line"
		missing=1
	done < <(grep CONFIG_ /kernel/wanted)
	[ "$missing" = 0 ]

	echo "== kernel and modules"
	make -j"$(nproc)" "${args[@]}" linux modules
	cp linux /kernel/vmlinuz
	make -s "${args[@]}" INSTALL_MOD_PATH=/kernel DEPMOD=true modules_install
	rm -f /kernel/lib/modules/"$release"/build
	depmod -b /kernel "$release"
	cp .config /kernel/config
	# Its module loader knows only a few kinds of relocations.
	printf '%s\n' ARCH=um "KCFLAGS=-fno-pie -mcmodel=large" >/kernel/makeargs
	echo "-Crelocation-model=static -Ccode-model=large" >/kernel/rustflags
	echo 3072 >/kernel/memory

	# Building modules only needs headers, scripts and metadata.
	find . \( -name '*.o' -o -name '*.a' -o -name '*.ko' -o -name 'vmlinux*' -o -name linux -o -name '.tmp_*' -o \
		-name '.*.cmd' \) ! -path './scripts/*' ! -path './tools/*' -type f -delete
	find drivers sound fs net mm -name '*.c' -delete
	[ "$(cat include/config/kernel.release)" = "$release" ]
	[ -s rust/libkernel.rmeta ] && [ -s rust/libmacros.so ] && [ -s Module.symvers ]
	echo "$release" >/kernel/release
}
