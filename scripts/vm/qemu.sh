#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs in the tool-chain root: boots the kernel at /kernel in QEMU, with the run directory $VM_RUN, until the VM ends.
set -euo pipefail

# shared TAG DIR OPTIONS: print QEMU's arguments that share DIR over 9p, as TAG.
shared() {
	echo "-fsdev local,id=$1,path=$2,security_model=none,multidevs=remap$3 -device virtio-9p-pci,fsdev=$1,mount_tag=$1"
}

# Hangs and oopses panic, which ends the run. The limits are for emulation on a slow, busy machine.
# shellcheck disable=SC2054 # commas within words
append=(console=ttyS0 loglevel=7 log_buf_len=8M panic=-1 oops=panic softlockup_panic=1 hung_task_panic=1 unknown_nmi_panic=1
	watchdog_thresh=30 rcupdate.rcu_cpu_stall_timeout=90 sysctl.kernel.hung_task_timeout_secs=240
	panic_sys_info=all_bt,blocked_tasks)
# Switch off what only takes time on an emulated CPU.
append+=(mitigations=off no_timer_check 8250.nr_uarts=1 lsm=capability audit=0 rcupdate.rcu_expedited=1
	cryptomgr.notests)
# Each emulated CPU is a thread of the host, so the clocks of the CPUs differ by more than the kernel's check allows;
# and the check itself spins in a timer with interrupts off.
append+=(tsc=nowatchdog)
[ ! -f /kernel/cmdline ] || append+=("$(cat /kernel/cmdline)")
append+=("$VM_KERNEL_ARGS")

# shellcheck disable=SC2054 # commas within words
args=(-machine pc -accel "$VM_ACCEL" -cpu "max,la57=off" -smp "$VM_SMP" -m "$VM_MEM" -nodefaults -no-reboot
	-display none -kernel "$VM_BOOT/kernel" -initrd "$VM_BOOT/initrd" -append "${append[*]}"
	-serial "file:$VM_RUN/console"
	-chardev "pipe,id=monitor,path=$VM_RUN/monitor" -mon chardev=monitor
	-device virtio-serial-pci
	# QEMU's monitor for the guest, since tests unplug disks. Relative names, because paths of sockets must be short.
	-chardev "socket,id=qmp,path=qmp,server=on,wait=off" -mon chardev=qmp,mode=control
	-chardev "socket,id=guestqmp,path=qmp" -device "virtserialport,chardev=guestqmp,name=monitor")
# shellcheck disable=SC2207 # no blanks in these
args+=($(shared root / ,readonly=on) $(shared run "$VM_RUN" ''))
# shellcheck disable=SC2207
[ -z "$VM_SHARE" ] || args+=($(shared share "$VM_SHARE" ''))
if [ -e "$VM_RUN/cmd" ]; then
	# A standard input that never ends: QEMU closes the port at the end of its standard input.
	mkfifo "$VM_RUN/in"
	exec <>"$VM_RUN/in"
	args+=(-chardev "stdio,id=out,signal=off" -device "virtserialport,chardev=out,name=out")
else
	args+=(-chardev "stdio,id=shell,signal=off,mux=on" -device "virtconsole,chardev=shell")
fi
# shellcheck disable=SC2206 # words, as a shell would split them
args+=($VM_QEMU_ARGS)

cd "$VM_RUN"
mkfifo "$VM_RUN/monitor.in" "$VM_RUN/monitor.out"
exec qemu-system-x86_64 "${args[@]}"
