#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Boots the test VM for a shell, or for the command in RUN, and exits with the command's status. The VM is QEMU or
# User-Mode Linux. Status 124: TIMEOUT seconds after the start of the VM, the command was not over; 125: the VM died, in
# its boot or later (see its kernel log); 126: the VM did not start, or did not begin the command within START_TIMEOUT
# seconds.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/kernel.sh"
. "$SCRIPTS/accel.sh"

"$SCRIPTS/setup.sh"
kernel_select

# The run directory, which is the guest's /run/vm. First remove those of runs that have ended.
for old in "$BUILD"/vm/run.*; do
	kill -0 "${old##*.}" 2>/dev/null || rm -rf "$old"
done
VM_RUN=$BUILD/vm/run.$$
mkdir -p "$VM_RUN"
kernel_log=${VM_LOG:-$BUILD/vm/kernel.log}

# boot_files: set VM_BOOT to the directory with what QEMU boots: the kernel of $guest_dir, and an initrd. There is one
# directory for each kernel, root, and version of vm/init and vm/boot-files.sh. If it doesn't exist, those that weren't
# used for a day are removed, and it is made.
boot_files() {
	local key
	key=$({ cat "$SCRIPTS"/vm/{init,boot-files.sh} && say "${guest_dir##*/} ${ROOT##*/}"; } | short_hash)
	VM_BOOT=$BUILD/vm/boot-$key
	if [ ! -d "$VM_BOOT" ]; then
		find "$BUILD"/vm -maxdepth 1 -name 'boot-*' -mtime +0 -exec rm -rf {} +
		"$SCRIPTS/in-root.sh" -k "$guest_dir" scripts/vm/boot-files.sh scripts/vm/init "$(in_root "$VM_RUN/boot")"
		mv -T "$VM_RUN/boot" "$VM_BOOT" 2>/dev/null || [ -d "$VM_BOOT" ]
	fi
	touch "$VM_BOOT"
}

# guest_env: print the variables that scripts/vm/guest.sh reads.
guest_env() {
	local size module=$BUILD/$K_RELEASE/dm_overlaybd.ko virtio=y end=reboot
	[ "$monitor" = qemu ] || virtio='' end=poweroff
	size=$(stty size 2>/dev/null) || size='24 80'
	[ "$size" != '0 0' ] || size='24 80'
	[ ! -f "$module" ] || printf 'VM_MODULE=%q\n' "$(in_root "$module")"
	printf '%s=%q\n' VM_CLONE "$IN_ROOT" VM_TERM "${TERM:-}" \
		VM_ROWS "${size% *}" VM_COLS "${size#* }" VM_VIRTIO "$virtio" VM_END "$end"
	[ -z "${VM_BOOT:-}" ] || printf 'export OBD_VM_KERNEL=%q\n' "$(in_root "$VM_BOOT/kernel")"
	[ "$guest_dir" = "$K_DIR" ] || printf 'export OBD_VM_MODULES=/mnt/vm-kernel OBD_VM_RELEASE=%q\n' "$(cat "$guest_dir/release")"
	env -0 | while IFS='=' read -r -d '' name value; do
		[[ $name != OBD_* ]] || printf 'export %s=%q\n' "$name" "$value"
	done
}

# watch PID: end the VM, whose process is PID, TIMEOUT seconds after its start; or after START_TIMEOUT seconds, if the
# guest hasn't started its command by then. With QEMU, an NMI first makes the kernel print its call traces.
watch() {
	local i over=timeout
	for ((i = 0; i < ${TIMEOUT:-1800}; i++)); do
		sleep 1
		[ -d "$VM_RUN" ] || return 0
		if [ "$i" -ge "${START_TIMEOUT:-300}" ] && [ ! -e "$VM_RUN/started" ]; then
			over=hung
			break
		fi
	done
	: >"$VM_RUN/$over"
	[ ! -p "$VM_RUN/monitor.in" ] || echo nmi 1<>"$VM_RUN/monitor.in"
	sleep 5
	end_vm "$1"
}

# end_vm PID: end the VM, whose process is PID.
end_vm() {
	[ ! -p "$VM_RUN/monitor.in" ] || echo quit 1<>"$VM_RUN/monitor.in"
	sleep 1
	"${SUDO[@]}" kill -9 "$1" 2>/dev/null || :
}

# save_log: copy the guest's console to $kernel_log. Without a console, no log of an earlier VM stays there.
save_log() {
	mkdir -p "$(dirname "$kernel_log")"
	[ ! -f "$kernel_log" ] || rm -f "$kernel_log"
	[ ! -f "$VM_RUN/console" ] || tr -d '\r' <"$VM_RUN/console" >"$kernel_log"
}

# verdict VM_STATUS: set status to the exit status of this script; if the command has not ended, say why. VM_STATUS is
# the exit status of the VM's process, QEMU or User-Mode Linux.
verdict() {
	if [ -s "$VM_RUN/status" ]; then
		status=$(cat "$VM_RUN/status")
		return
	elif [ -e "$VM_RUN/hung" ]; then
		warn "vm: the guest did not begin its command within ${START_TIMEOUT:-300} s; from $kernel_log:"
		status=126
	elif [ -e "$VM_RUN/timeout" ]; then
		warn "vm: the command was not over ${TIMEOUT:-1800} s after the start of the VM; from $kernel_log:"
		status=124
	elif [ -s "$kernel_log" ]; then
		warn "vm: the guest died; from $kernel_log:"
		status=125
	else
		warn "vm: the VM did not start (status $1)"
		status=126
	fi
	[ ! -f "$kernel_log" ] || trouble "$kernel_log" | sed 's/^/    /' >&2
}

# trouble LOG: print 60 lines of the log from the first sign of trouble on; the last 40 lines if there is no such sign.
trouble() {
	local line
	line=$(grep -m1 -nE 'Kernel panic|BUG:|Oops|general protection|WARNING:|blocked for more than' "$1" | cut -d: -f1) || :
	if [ -n "$line" ]; then
		tail -n "+$line" "$1" | head -n 60
	else
		tail -n 40 "$1"
	fi
}

monitor=qemu
! grep -qx CONFIG_UML=y "$K_DIR/config" || monitor=uml
# The kernel of the virtual machines that tests start inside the VM: the VM's own kernel; with uml-host, which QEMU
# cannot boot, the stock kernel.
guest_dir=$K_DIR
[ "$KERNEL" != uml-host ] || guest_dir=$(KERNEL=stock kernel_select && say "$K_DIR")
if [ "$monitor" = qemu ]; then
	boot_files
	accel
else
	[ "$KERNEL" != uml-host ] || boot_files
	[ -n "${RUN:-}" ] || die "KERNEL=$KERNEL has no shell; give it a command with RUN="
fi
[ -z "${RUN:-}" ] || printf '%s\n' "$RUN" >"$VM_RUN/cmd"
cp "$SCRIPTS/vm/guest.sh" "$VM_RUN/"
guest_env >"$VM_RUN/env"
binds=()
if [ -n "${SHARE:-}" ]; then
	mkdir -p "$SHARE"
	SHARE=$(realpath "$SHARE")
	: >"$VM_RUN/share"
	binds+=(-b "$SHARE:/srv")
fi
[ "$guest_dir" = "$K_DIR" ] || binds+=(-b "$guest_dir:/mnt/vm-kernel")
[ ! -d "$GOLDENS" ] || binds+=(-b "$(realpath "$GOLDENS"):/mnt/goldens")
[ ! -d "$DEBIAN_IMAGE" ] || binds+=(-b "$DEBIAN_IMAGE:/mnt/debian-image")

# Compute the expected results for malformed images here, since that is slow in the guest. Does nothing if they are
# known.
case ${RUN:-} in
*--but*mutants*) ;;
*tests/run.sh | *mutants*)
	flock "$BUILD/vm/verdicts.lock" "$SCRIPTS/in-root.sh" \
		env PATH="$IN_ROOT/build/cargo/release:/usr/sbin:/usr/bin:/sbin:/bin" tests/mutants.py --verdicts
	;;
esac

stdin=/dev/null
[ -n "${RUN:-}" ] || stdin=/dev/stdin
[ "$monitor" = qemu ] || binds+=(-b "$VM_RUN:/run/vm")
# boot: start the guest in the background; set vm to its process and, for a command, watcher to that of watch.
boot() {
	rm -f "$VM_RUN"/{monitor.in,monitor.out,in,qmp,console,hung,started}
	"$SCRIPTS/in-root.sh" -k "$K_DIR" "${binds[@]}" env VM_RUN="$(in_root "$VM_RUN")" \
		VM_BOOT="${VM_BOOT:+$(in_root "$VM_BOOT")}" VM_ACCEL="${VM_ACCEL:-}" \
		VM_SMP="${QEMU_SMP:-2}" VM_MEM="${QEMU_MEM:-$(cat "$K_DIR/memory" 2>/dev/null || say 2048)}" \
		VM_SHARE="${SHARE:+/srv}" VM_QEMU_ARGS="${QEMU_ARGS:-}" VM_KERNEL_ARGS="${KERNEL_ARGS:-}" \
		VM_INIT="$IN_ROOT/scripts/vm/init-uml" "scripts/vm/$monitor.sh" <"$stdin" &
	vm=$!
	watcher=
	if [ -n "${RUN:-}" ]; then
		watch "$vm" >/dev/null 2>&1 &
		watcher=$!
	fi
}

boot
trap 'end_vm $vm; save_log; rm -rf "$VM_RUN"; exit 130' INT TERM HUP
status=0
wait "$vm" || status=$?
if [ -e "$VM_RUN/hung" ]; then
	# The module was not loaded yet, so it isn't the cause: the emulation is, or a very busy machine. Boot again once.
	save_log
	[ ! -f "$kernel_log" ] || mv "$kernel_log" "$kernel_log.hung"
	warn "vm: the guest did not begin its command within ${START_TIMEOUT:-300} s (see $kernel_log.hung); booting it again"
	status=0
	boot
	wait "$vm" || status=$?
fi
[ -z "$watcher" ] || kill "$watcher" 2>/dev/null || :
save_log
verdict "$status"
rm -rf "$VM_RUN"
exit "$status"
