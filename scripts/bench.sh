#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Measures, and compares with the goals: bench.sh. PARTS='NAME...' selects parts of the benchmark, see PARTS in
# tests/bench/run.py. VM=uml (the default) measures at the machine's speed, PARTS or all parts: interrupts with two
# CPUs, block and file with one CPU and with two, the others with one; it fails if interrupts were lost. VM=qemu
# measures for a shorter time with the stock kernel: PARTS, or block and file. VM=icount counts the instructions of
# reads with the stock kernel, on an emulated CPU whose clock ticks once for each instruction, with two models of the
# CPU or those in CPU_MODELS (erms, no-erms), and with PROFILE=y, for some rows, also by function; it fails if a row of
# this project has over 2 % more than in tests/bench/instructions.json, or, with UPDATE=y, writes that file.
# COMPARE=FILE prints what changed since that result. VM=guests measures the memory of guests instead: bench-guests.sh.
# VM=tools measures obdsetup, without a VM: bench-tools.sh.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/kernel.sh"

VM=${VM:-uml}
case $VM in
uml) kernels=(uml uml-smp) ;;
qemu | icount) kernels=(stock) ;;
guests) exec "$SCRIPTS/bench-guests.sh" ;;
tools) exec "$SCRIPTS/bench-tools.sh" ;;
*) die "VM=$VM: must be uml, qemu, icount, guests or tools" ;;
esac
# QEMU counts an instruction that copies or clears memory as one for each byte. The second CPU lacks those that are fast
# for any size, so the kernel uses others, which handle 8 bytes at once.
declare -A models=([erms]="" [no-erms]="-cpu max,la57=off,erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off")
read -ra chosen <<<"${CPU_MODELS:-erms no-erms}"
for model in "${chosen[@]}"; do
	[ -n "${models[$model]+is there}" ] || die "CPU_MODELS: no model $model; there are: erms no-erms"
done
[ -z "${COMPARE:-}" ] || [ -s "$COMPARE" ] || die "COMPARE=$COMPARE: no such file, or it is empty"
out=$BUILD/bench
# Counting needs smaller images, of data that is the same on every machine.
size='' memory=6144
[ "$VM" != icount ] || size=small memory=2048
# The images are made again when images.sh, tree.py, the tool-chain root, or obdsetup's source files in mkfs change.
images=$CACHE/bench-$({ cat "$SCRIPTS/bench/images.sh" "$CLONE/tests/bench/tree.py" && root_key && say "$size" &&
	find "$CLONE/tools/obdsetup/src" -path '*/mkfs*' -type f -print0 | sort -z | xargs -0r cat; } | short_hash)
export OBD_RAM_DISKS=900 OBD_RAM_KIB=$((512 << 10))

# A function called by step doesn't stop at an error, because step checks its status: hence the && below.

# shellcheck disable=SC2317 # step calls it
make_images() {
	[ -d "$images" ] && cache_used "${images##*/}" && return
	cache_begin "${images##*/}" || return 0
	mkdir -p "$TMP"
	"$SCRIPTS/in-root.sh" -b "$TMP:/srv" scripts/bench/images.sh /srv ${size:+"$size"} &&
		cache_commit "${images##*/}" &&
		cache_used "${images##*/}"
}

# shellcheck disable=SC2317
modules() {
	"$SCRIPTS/build-module.sh" && "$SCRIPTS/build-module.sh" bench
}

# shellcheck disable=SC2317
# measure RESULT ARGUMENTS...: run the benchmark in the VM with $KERNEL.
measure() {
	# The part interrupts has six phases of OBD_STORM_SECONDS: run_storm() in tests/bench/obd_bench.c.
	local result=$1 limit=$((3000 + 6 * ${OBD_STORM_SECONDS:-0}))
	shift
	kernel_look_up
	rm -f "$images/result-$K_RELEASE.json"
	SHARE=$images QEMU_MEM=$memory TIMEOUT=${TIMEOUT:-$limit} VM_LOG=$LOGS/kernel-bench-$result.log \
		KERNEL_ARGS="${PROFILE:+nokaslr }brd.rd_nr=$OBD_RAM_DISKS brd.rd_size=$OBD_RAM_KIB" \
		RUN="tests/bench/guest.sh $*" "$SCRIPTS/vm.sh" &&
		mv "$images/result-$K_RELEASE.json" "$out/$result.json"
}

# shellcheck disable=SC2317
# plugin: build the plugin of QEMU that counts by function, in the new directory profile of the images.
plugin() {
	rm -rf "$images/profile" && mkdir "$images/profile" &&
		"$SCRIPTS/in-root.sh" -b "$images:/srv" gcc -O2 -Wall -shared -fPIC -Wl,--unresolved-symbols=ignore-all \
			-o /srv/profile/plugin.so tests/bench/profile_plugin.c
}

# shellcheck disable=SC2317
# count MODEL: count instructions with that model of CPU. The guest's clock depends on nothing but their number, so
# there is one CPU, run by one thread.
count() {
	export VM_ACCEL=tcg,thread=single QEMU_SMP=1
	export QEMU_ARGS="-icount shift=0,sleep=off ${models[$1]}"
	rm -rf "$images/profile"
	if [ -n "${PROFILE:-}" ]; then
		plugin || return
		QEMU_ARGS+=" -plugin /srv/profile/plugin.so,dir=/srv/profile"
	fi
	measure "icount-$1" count "${parts[@]}" || return
	[ -z "${PROFILE:-}" ] || { rm -rf "$out/profile-$1" && mv "$images/profile" "$out/profile-$1"; }
}

# counting: count with each model of CPU, then compare with the figures in the tree.
counting() {
	local model
	if [[ ${#parts[@]} = 0 || " ${parts[*]} " == *" peers "* ]]; then
		# Debian has no ublk server. It may be impossible to build it here, without a network.
		step "rublk" "$SCRIPTS/in-root.sh" env -u CARGO_TARGET_DIR cargo install --locked rublk@0.2.13 || :
	fi
	for model in "${chosen[@]}"; do
		must "counting instructions, CPU $model" count "$model"
	done
	if [ -n "${PROFILE:-}" ]; then
		for model in "${chosen[@]}"; do
			"$SCRIPTS/in-root.sh" tests/bench/by_function.py "build/bench/profile-$model"
		done
	fi
	"$SCRIPTS/in-root.sh" tests/bench/instructions.py build/bench ${UPDATE:+update}
}

must() { step "$@" || die "no result"; }

export USE_ROOT=1 KDIR='' CARGO='' QUIET=1
alone
mkdir -p "$out"
[ -z "${COMPARE:-}" ] || cp "$COMPARE" "$out/older"
rm -rf "$out"/*.json "$out"/profile-*
read -ra parts <<<"${PARTS:-}"

# parts_for KERNEL: set words to the arguments of the benchmark with that kernel: the wanted parts that run with it, and
# short for stock. For uml without PARTS, words is empty: then the benchmark runs all parts but interrupts, which needs
# two CPUs. Only block, file and interrupts run with two CPUs: the other parts have one reader, readers on one CPU, or
# measure no reads.
parts_for() {
	local part
	words=()
	case $1 in
	stock) words=(short "${parts[@]}") ;;
	uml)
		for part in "${parts[@]}"; do
			[ "$part" = interrupts ] || words+=("$part")
		done
		;;
	uml-smp)
		for part in block file interrupts; do
			[[ ${#parts[@]} != 0 && " ${parts[*]} " != *" $part "* ]] || words+=("$part")
		done
		;;
	esac
}

if [ "$VM" = uml ] && [ "${#parts[@]}" != 0 ]; then
	kernels=()
	for kernel in uml uml-smp; do
		parts_for $kernel
		[ "${#words[@]}" = 0 ] || kernels+=("$kernel")
	done
fi
if [ "$VM" = icount ]; then
	steps $((6 + ${#chosen[@]}))
	[[ ${#parts[@]} != 0 && " ${parts[*]} " != *" peers "* ]] || STEP_TOTAL=$((STEP_TOTAL + 1))
else
	steps $((4 + 3 * ${#kernels[@]}))
fi
must "tool-chain root" "$SCRIPTS/make-root.sh"
must "kernel and its Rust tree" "$SCRIPTS/make-kernel.sh"
must "obdsetup" "$SCRIPTS/build-tools.sh"
must "images" make_images
for KERNEL in "${kernels[@]}"; do
	export KERNEL
	must "$KERNEL kernel" "$SCRIPTS/make-kernel.sh"
	must "modules for the $KERNEL kernel" modules
	if [ "$VM" = icount ]; then
		counting
		exit
	fi
	parts_for "$KERNEL"
	must "measuring with the $KERNEL kernel" measure "$KERNEL" "${words[@]}"
done
"$SCRIPTS/in-root.sh" tests/bench/report.py build/bench ${COMPARE:+build/bench/older}
