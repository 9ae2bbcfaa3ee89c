# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Chooses whether QEMU uses KVM or emulates the CPU (TCG). Sourced after cache.sh.

# accel: set VM_ACCEL, unless it is set: to KVM if a boot with KVM succeeds on this machine, else to TCG. The cache
# keeps the result for this kernel, machine and CPU. The log of the boot goes to $VM_RUN.
accel() {
	local seen
	[ -z "${VM_ACCEL:-}" ] || return 0
	VM_ACCEL=tcg,thread=multi
	[ -w /dev/kvm ] || return 0
	seen=$CACHE/kvm-$({ uname -r && cat /etc/machine-id && grep -m1 'model name' /proc/cpuinfo; } 2>/dev/null | short_hash)
	if [ ! -s "$seen" ]; then
		if VM_ACCEL=kvm RUN=true SHARE='' TIMEOUT=15 VM_LOG=$VM_RUN/kvm.log QEMU_ARGS='' KERNEL_ARGS='' \
			"$SCRIPTS/vm.sh" >/dev/null 2>&1; then
			say kvm >"$seen"
		else
			say "$VM_ACCEL" >"$seen"
		fi
	fi
	VM_ACCEL=$(cat "$seen")
}
