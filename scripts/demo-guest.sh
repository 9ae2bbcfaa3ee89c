#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The demonstration that scripts/demo.sh ("make demo") runs in the test VM: it makes an image of three layers, opens it,
# reads it, and closes it.
# shellcheck disable=SC2016 # commands are shown as they are, and expanded when they run
set -euo pipefail

SOURCES=$PWD
WORK=/tmp/demo
step=0

# step TEXT [LINE]...: print the number of the next step, what it is, and the reason for it.
step() {
	step=$((step + 1))
	printf '\n%d. %s\n' "$step" "$1"
	shift
	[ $# = 0 ] || printf '   %s\n' "$@"
	echo
}

# run COMMAND: show a command, run it in a subshell, and show what it prints, 150 characters of each line at most.
run() {
	printf '   $ %s\n' "$1"
	eval "$1" 2>&1 | cut -c1-150 | sed 's/^/   /'
}

# finish: after a failure, print the step and the end of the kernel log.
finish() {
	local status=$?
	[ "$status" = 0 ] && return
	printf '\nThe demo has failed at step %d. The end of the kernel log:\n' "$step"
	dmesg | tail -n 15 | sed 's/^/   /'
}
trap finish EXIT

# free_memory [WANTED]: drop all caches, and print the MiB that are available then (MemAvailable). The kernel frees some
# memory late, so with WANTED, try again for some seconds until at least WANTED are available.
free_memory() {
	local free _
	for _ in {1..20}; do
		sync
		echo 3 >/proc/sys/vm/drop_caches
		free=$(awk '/^MemAvailable/ { printf "%d", $2 / 1024 }' /proc/meminfo)
		[ "$free" -lt "${1:-0}" ] || break
		sleep 0.3
	done
	echo "$free"
}

# edit COMMAND...: run each command, which changes files in mnt, and run it again with "expected" in the place of "mnt".
edit() {
	local command
	for command; do
		run "$command"
		eval "${command//mnt/expected}"
	done
}

modprobe -a loop dm-snapshot
mkdir -p "$WORK/tree" "$WORK/mnt"
cp -a "$SOURCES"/{Kbuild,Makefile,include,rust,scripts} "$WORK/tree/"
cp -a "$WORK/tree" "$WORK/expected"
cd "$WORK"
modprobe ext4
before=$(free_memory)

cat <<-END

	An OverlayBD image is a disk in layers, as container images have them: each layer
	holds the sectors that it changes, usually compressed. The kernel module
	dm_overlaybd makes such an image a read-only disk, with no daemon. This is a virtual
	machine with an unmodified kernel, $(uname -r), and the module; \`tree' is a
	directory with $(find tree -type f | wc -l) files, the module's own sources.
END

step "Layer 1: the directory, as an ext4 file system, compressed with LZ4."
run 'obdsetup create --directory tree --fs ext4 --size 32m layer1.obd'

step "Layer 2: changes to that file system. The disk is written out, mounted and edited;" \
	"the difference becomes a layer, compressed with zstd, in a tar as registries have it."
run 'obdsetup dump layer1.obd -o disk.raw --sparse'
run 'mount -o loop disk.raw mnt'
edit 'mkdir mnt/new' 'seq 200000 >mnt/new/numbers' "echo 'of layer 2' >mnt/new/second.txt" \
	"echo '# of layer 2' >>mnt/Makefile"
run 'umount mnt'
run 'obdsetup create --base layer1.obd --image disk.raw --algorithm zstd --tar layer2.obd'

step "Layer 3: it deletes files, discards their blocks, and overwrites a file; not compressed."
run 'mount -o loop disk.raw mnt'
edit 'rm -r mnt/scripts/vm mnt/Kbuild' "echo 'of layer 3' >mnt/Makefile" \
	'mv mnt/new/second.txt mnt/new/renamed.txt'
run 'fstrim -v mnt'
run 'umount mnt'
run 'obdsetup create --base layer1.obd --base layer2.obd --image disk.raw --algorithm none layer3.obd'
rm disk.raw
echo
run 'ls -l --time-style=+ *.obd'

step "One command makes the three files a disk."
run 'obdsetup open demo layer1.obd layer2.obd layer3.obd'

step "What device-mapper has now: a zfile device for each compressed layer, a linear" \
	"one for the other, and the lsmt device \`demo' that puts all layers together, lowest first."
run 'dmsetup table'
echo
run 'dmsetup status'
echo
run 'dmsetup ls --tree'

step "The disk can be mounted. The files of all three layers are in their places."
run 'mount -o ro /dev/mapper/demo mnt'
run 'ls -F mnt mnt/new'
run 'cat mnt/Makefile mnt/new/renamed.txt'

step "Every file equals its source: \`expected' is the tree with the same edits."
run '(cd expected && find . -type f -print0 | sort -z | xargs -0 sha256sum) >sums'
run '(cd mnt && sha256sum --check --quiet "$OLDPWD/sums") && echo "$(wc -l <sums) checksums agree"'
run 'diff <(cd expected && find . | sort) <(cd mnt && find . | grep -v lost+found | sort) && echo "the same files"'
run 'umount mnt'

step "The disk is read-only. A snapshot on top takes writes, and the layers stay as they are."
run 'sha256sum <layer1.obd >before; sha256sum </dev/mapper/demo >>before'
truncate -s 16M writes
cow=$(losetup --find --show writes)
run "dmsetup create demo-rw --table '0 65536 snapshot /dev/mapper/demo $cow N 8'"
run 'mount /dev/mapper/demo-rw mnt'
run 'echo "written through the snapshot" >mnt/new/written.txt; cat mnt/new/written.txt'
run 'umount mnt; dmsetup remove demo-rw'
losetup --detach "$cow"
run '{ sha256sum <layer1.obd; sha256sum </dev/mapper/demo; } | cmp - before && echo "the layers are unchanged"'

step "One command closes the disk. Nothing is left: no device, no loop device, no user of the" \
	"module, and the memory is free again."
run 'obdsetup close demo'
run 'dmsetup ls'
run 'losetup --list --noheadings | wc -l'
run 'lsmod | awk '"'"'$1 == "dm_overlaybd" { print "users of dm_overlaybd: " $3 }'"'"
rm -rf layer?.obd writes expected sums before
after=$(free_memory $((before - 15)))
echo "   free memory: $before MiB before, $after MiB now"
[ "$(dmsetup ls)" = "No devices found" ]
[ -z "$(losetup --list --noheadings)" ]
[ "$(</sys/module/dm_overlaybd/refcnt)" = 0 ]
[ $((before - after)) -lt 16 ]

printf '\nDone.\n'
