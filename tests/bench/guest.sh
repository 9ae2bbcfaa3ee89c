#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs in the guest: loads what the benchmark needs and runs it, with the images in the VM's share. guest.sh
# ARGUMENTS...
set -eu

cd "$(dirname "$0")/../.."
insmod "build/$(uname -r)/obd_bench.ko"
modprobe -qa dm-delay loop erofs squashfs ext4 || :
modprobe -q null_blk nr_devices=0 || :
[ -e /dev/ram0 ] || modprobe brd "rd_nr=$OBD_RAM_DISKS" "rd_size=$OBD_RAM_KIB"
exec python3 tests/bench/run.py /mnt/share "/mnt/share/result-$(uname -r).json" "$@"
