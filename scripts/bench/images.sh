#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# In the tool-chain root: makes a tree of files, and images of it in every format that the benchmark compares:
# images.sh DIR [small]. The tree has 272 MiB of this root's files; with small, it has 21 MiB of text, the same on every
# machine.
set -euo pipefail

out=$1
small=${2:-}
clone=$PWD
mib=272
[ -z "$small" ] || mib=24
export PATH=$PWD/build/cargo/release:$PATH
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$out"

# files_of_root: copy headers, scripts and data; then programs, in the order of their names, until the tree has $mib MiB.
files_of_root() {
	local file size
	cd /usr
	cp -a include share lib/python3* "$tree/"
	mkdir "$tree/bin"
	size=$(du -sm "$tree" | cut -f1)
	for file in bin/*; do
		[ "$size" -lt "$mib" ] || break
		if [ ! -f "$file" ] || [ -L "$file" ]; then continue; fi
		cp -a "$file" "$tree/bin/"
		size=$(du -sm "$tree" | cut -f1)
	done
}

echo "== tree"
if [ -n "$small" ]; then
	"$clone/tests/bench/tree.py" "$tree"
else
	files_of_root
fi
(cd "$tree" && find . -type f -printf '%s %p\n' | sort -k2) >"$out/files"

echo "== layers"
cd "$out"
# Without checksums in ext4, as the other file systems have none.
obdsetup create --directory "$tree" --fs ext4 --size $((mib * 5 / 4))m --mkfs-arg=-O^metadata_csum --algorithm none raw.lsmt
for algorithm in lz4 zstd; do
	for block in 4 64; do
		obdsetup commit --algorithm $algorithm --block-size ${block}k --no-crc raw.lsmt $algorithm-${block}k.obd
	done
done
obdsetup commit --algorithm lz4 --block-size 4k raw.lsmt lz4-4k-crc.obd

# A read-only file system that doesn't compress by itself.
obdsetup create --directory "$tree" --fs erofs --algorithm none erofs.lsmt
obdsetup commit --algorithm lz4 --block-size 4k --no-crc erofs.lsmt erofs-lz4-4k.obd
obdsetup commit --algorithm zstd --block-size 64k --no-crc erofs.lsmt erofs-zstd-64k.obd

# Two more layers on top, of 16 MiB and of 1 MiB in pieces of 64 KiB, among the first 128 MiB: for the parts that need
# large images.
layer_on_top() {
	local seed=$1
	PYTHONPATH=$clone/tests python3 - "$seed" "$tree/bin" <<-'END'
		import os, random, sys
		from obdtest import image
		seed, source = sys.argv[1:]
		rng = random.Random(seed)
		largest = max((os.path.join(source, name) for name in os.listdir(source)), key=os.path.getsize)
		with open(largest, "rb") as file:
		    data = file.read({"b": 16 << 20, "c": 1 << 20}[seed])
		places = rng.sample(range(2048), len(data) // 65536)
		extents = [(place * 128, data[nth * 65536:(nth + 1) * 65536]) for nth, place in enumerate(places)]
		with open("raw.lsmt", "rb") as file:
		    file.seek(-4096 + 48, os.SEEK_END)
		    size = int.from_bytes(file.read(8), "little")
		with open(f"{seed}.lsmt", "wb") as file:
		    file.write(image.lsmt(size, extents))
	END
	obdsetup commit --algorithm lz4 --block-size 4k --no-crc "$seed.lsmt" "$seed.obd"
}
if [ -z "$small" ]; then
	layer_on_top b
	layer_on_top c
fi

echo "== erofs"
for algorithm in lz4 zstd; do
	for block in 4 64; do
		mkfs.erofs --quiet -z$algorithm -C$((block << 10)) $algorithm-${block}k.erofs "$tree"
	done
done
# -C limits the size of an extent after compression. Here, its size before compression is limited, too, as in a ZFile
# with blocks of 64 KiB.
mkfs.erofs --quiet -zzstd -C65536 --max-extent-bytes=65536 zstd-64k-extents.erofs "$tree"

echo "== squashfs"
mksquashfs "$tree" lz4-4k.squashfs -comp lz4 -b 4096 -no-progress -quiet
mksquashfs "$tree" lz4-128k.squashfs -comp lz4 -b 131072 -no-progress -quiet
mksquashfs "$tree" zstd-128k.squashfs -comp zstd -b 131072 -no-progress -quiet
