#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs in the tool-chain root: runs the User-Mode Linux at /kernel, with the run directory $VM_RUN, until it ends. The
# guest's root file system is this root; what the guest writes in its tmpfs is gone with the mount namespace.
set -euo pipefail

# User-Mode Linux keeps the guest's memory in a file in TMPDIR, which must not be mounted noexec.
export TMPDIR=/dev/shm
[ -w "$TMPDIR" ] || export TMPDIR=/tmp

# shellcheck disable=SC2206,SC2054 # words, as a shell would split them; commas within words
args=("mem=${VM_MEM}M" "ncpus=$VM_SMP" seccomp=on root=/dev/root rootfstype=hostfs rootflags=/ rw "init=$VM_INIT"
	con=null ssl=null con0=fd:0,fd:1 ssl0=null,fd:3 console=ttyS0 loglevel=7 log_buf_len=8M panic=-1 oops=panic
	$VM_KERNEL_ARGS)
# A kernel for one CPU doesn't know ncpus.
! grep -qx '# CONFIG_SMP is not set' /kernel/config || args=("${args[@]/#ncpus=*/}")
exec /kernel/vmlinuz "${args[@]}" 3>"$VM_RUN/console"
