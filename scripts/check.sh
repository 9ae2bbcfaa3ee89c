#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Everything a change has to pass: check.sh [PART...]. The last line sums it all up.
#   stock   lints, builds, tests in user space and, with Debian's kernel, in the VM (the default)
#   system  with Debian's kernel, in the VM, tests of what an administrator puts together: tests/system
#   both    stock and system at once
#   cpus    with Debian's kernel, in a VM with CPUs that are offline or isolated from boot: which CPUs work; and in another
#           that panic_on_corruption panics
#   forky   lint and build of the module, and the tests in the VM, with the kernel and the tool chain of Debian forky
#   debug   the tests in the VM with the debug kernel; of tests that are alike, a third, each day another
#   kcsan   those that have several things at once, with the KCSAN kernel
#   kills   with Debian's kernel, in the VM, obdsetup killed $OBD_KILLS (50) times in each way
#   soak    a random mix of everything for $MINUTES (30), with the debug kernel
. "$(dirname "$0")/lib.sh"

passed=0 failed=0
# How many tests were skipped for a cause.
declare -A causes=()

# show_causes: of an array of causes that has this name.
show_causes() {
	local -n of=$1
	local cause tests
	for cause in "${!of[@]}"; do
		tests="tests"
		[ "${of[$cause]}" != 1 ] || tests="test"
		say "      skipped: $cause: ${of[$cause]} $tests"
	done | sort
}

# finish: a cause counts once, however many tests were skipped for it.
finish() {
	show_causes causes
	say "$passed passed, $failed failed, ${#causes[@]} skipped"
	[ "$failed" = 0 ]
	exit
}

# must TITLE CMD...: a step without which the rest makes no sense.
must() {
	step "$@" && return
	failed=$((failed + 1))
	finish
}

# counts TITLE CMD...: a step that is one test.
counts() {
	if step "$@"; then
		passed=$((passed + 1))
	else
		failed=$((failed + 1))
	fi
}

# add STATUS: what a step's tests came to, as ktap.awk prints it; a failure that none of them shows is one more.
add() {
	local status=$1 p f tests cause
	local -A now=()
	read -r p f
	while read -r tests cause; do
		now[$cause]=$tests
		causes[$cause]=$((${causes[$cause]:-0} + tests))
	done
	passed=$((passed + p))
	failed=$((failed + f))
	say "      $p passed, $f failed, ${#now[@]} skipped"
	show_causes now
	if [ "$f" = 0 ] && { [ "$status" != 0 ] || [ "$p" = 0 ]; }; then
		failed=$((failed + 1))
	fi
}

# cargo_results LOG: as ktap.awk does. The cause is in the name of a test, or in its attribute.
cargo_results() {
	awk '
		/^test result:/ { p += $4; f += $6 }
		/^test .* \.\.\. ignored/ {
			cause = "ignored unless cargo test is asked for it"
			if (sub(/.* \.\.\. ignored, /, ""))
				cause = $0
			else if (match($0, /\(skipped: [^)]*\)/))
				cause = substr($0, RSTART + 10, RLENGTH - 11)
			causes[cause]++
		}
		END { print p + 0, f + 0; for (cause in causes) print causes[cause], cause }' "$1"
}

# failures FILE...: the failed results in KTAP logs, each with what it says of itself.
failures() {
	awk '
		/^ *#/ { if (lines++ < 40) text = text $0 "\n"; next }
		/^ *not ok / { printf "%s%s\n", text, $0 }
		{ text = ""; lines = 0 }' "$@" | sed 's/^/    /'
}

# there FILE...: fail if one is missing or empty.
there() {
	local file
	for file; do
		[ -s "$file" ] || return
	done
}

# kernel_log_clean FILE...: fail, and show it, when a guest's kernel complained.
kernel_log_clean() {
	local log
	there "$@" && log=$(awk -f "$CLONE/tests/kcsan.awk" "$@") || return
	! grep -nE 'WARNING:|BUG:|Oops|Call Trace|KASAN|UBSAN|KCSAN|kmemleak: [0-9]+ new|unreferenced object|general protection|possible (circular|recursive)|inconsistent lock|suspicious RCU|pagealloc: |INFO: task .* blocked|detected stall|soft lockup|refcount_t:|Kernel panic|printk messages dropped' <<<"$log"
}

# nothing_skipped KERNEL FILE...: fail, and show it, when the output of tests says that some were left out. All can run
# where the kernel is made for it, but for what would take long to build, and images that may lack.
nothing_skipped() {
	local lacks='btrfs|xfs|IMA|io.max|tracing|cpuset'
	[ "$1" != kcsan ] || lacks+='|kmemleak|page owners'
	shift
	there "$@" || return
	! grep -h '# SKIP' "$@" | grep -vE "# SKIP (no golden image|all of it|all CPUs were online at boot|this kernel has no ($lacks)\$)"
}

# instrumented KERNEL: fail unless the checker of that kernel looks at the module's Rust code.
instrumented() {
	local calls=__asan_
	[ "$1" != kcsan ] || calls=__tsan_
	grep -q "$calls" "$BUILD"/*-"$1"/obj/rust/dm_overlaybd.o
}

# panics KERNEL: fail unless a corrupt block makes a guest panic where it has to, and only there.
panics() {
	local out=$LOGS/panic-$1.log log=$LOGS/panic-kernel-$1.log status=0
	KERNEL=$1 RUN="tests/run.sh panic" TIMEOUT=300 VM_LOG=$log "$SCRIPTS/vm.sh" >"$out" 2>&1 || status=$?
	cat "$out"
	[ "$status" = 125 ] && grep -q 'now the kernel has to panic' "$out" &&
		! grep -q 'not ok' "$out" &&
		grep -qE 'Kernel panic - not syncing: dm_overlaybd: [0-9]+:[0-9]+: corrupt block' "$log"
}

case ${1:-} in
--panics)
	panics "$2"
	exit
	;;
--cargo-results)
	cargo_results "$2"
	exit
	;;
--instrumented)
	instrumented "$2"
	exit
	;;
--kernel-log)
	kernel_log_clean "${@:2}"
	exit
	;;
--nothing-skipped)
	nothing_skipped "${@:2}"
	exit
	;;
esac

# set_up: what all parts need.
set_up() {
	must "tool-chain root" "$SCRIPTS/make-root.sh"
	must "kernel and its Rust tree" "$SCRIPTS/make-kernel.sh"
}

# user_space: the lints, obdsetup, and tests that need no VM.
user_space() {
	local lint status=0
	for lint in "${lints[@]}"; do
		counts "lint: $lint" "$SCRIPTS/lint.sh" "$lint"
	done
	must "obdsetup" "$SCRIPTS/build-tools.sh"
	step "cargo tests" "$SCRIPTS/build-tools.sh" test || status=$?
	add "$status" < <(cargo_results "$STEP_LOG")
	status=0
	step "scripts" "$CLONE/tests/scripts.sh" || status=$?
	add "$status" < <(awk -f "$SCRIPTS/ktap.awk" "$STEP_LOG")
	RECORD='' counts "fuzz" "$SCRIPTS/fuzz.sh" 10
}

# shellcheck disable=SC2317 # step calls it
# side_by_side TESTS...: the VM for each list of tests, all at once; each one's output is in a file, too.
side_by_side() {
	local nth status=0 pids=()
	for ((nth = 1; nth <= $#; nth++)); do
		(RUN="tests/run.sh${!nth:+ ${!nth}}" SHARE='' TIMEOUT=${TIMEOUT:-3000} VM_LOG=$LOGS/kernel-$KERNEL-$nth.log \
			"$SCRIPTS/vm.sh" 2>&1 | tee "$LOGS/vm-$KERNEL-$nth.log") &
		pids+=($!)
	done
	for nth in "${pids[@]}"; do
		wait "$nth" || status=$?
	done
	return "$status"
}

# rublk: a ublk server, for a recipe of the system tests; Debian has none. Once it is there this is quick.
rublk() {
	counts "rublk" "$SCRIPTS/in-root.sh" env -u CARGO_TARGET_DIR cargo install --locked rublk@0.2.13
}

# in_vm KERNEL TITLE TESTS...: tests with that kernel, a VM for each list of them.
in_vm() {
	local title=$2 status=0 checks=y results
	export KERNEL=$1
	shift 2
	case $KERNEL in
	stock | forky) checks= ;;
	esac
	[ "$KERNEL" = stock ] || must "$KERNEL kernel" "$SCRIPTS/make-kernel.sh"
	must "module for the $KERNEL kernel" "$SCRIPTS/build-module.sh"
	[ "$KERNEL" != forky ] || counts "lint: clippy-module with the $KERNEL kernel" "$SCRIPTS/lint.sh" clippy-module
	[ -z "$checks" ] || counts "the $KERNEL kernel checks the module's Rust code" "$0" --instrumented "$KERNEL"
	rm -f "$LOGS"/{vm,kernel}-"$KERNEL"-*.log
	step "$title with the $KERNEL kernel" side_by_side "$@" || status=$?
	results=$(awk -f "$SCRIPTS/ktap.awk" "$LOGS/vm-$KERNEL"-*.log)
	[[ $results =~ ^[0-9]+\ 0($|[^0-9]) ]] || failures "$LOGS/vm-$KERNEL"-*.log
	add "$status" <<<"$results"
	[ -z "$checks" ] ||
		counts "no test left out with the $KERNEL kernel" "$0" --nothing-skipped "$KERNEL" "$LOGS/vm-$KERNEL"-*.log
	counts "log of the $KERNEL kernel" "$0" --kernel-log "$LOGS/kernel-$KERNEL"-*.log
}

read -ra lints <<<"$("$SCRIPTS/lint.sh" --list)"
export USE_ROOT=1 KDIR='' CARGO='' NOBUILD=1
# Each in a VM of its own, as what is in none of them: with the debug kernel they take about as long as one another.
thirds=("mutants memory" "injection golden faults")
rest="--but ${thirds[*]}"
# These look at obdsetup more than at the module: with a kernel that is slow they are left out.
rest_of_module="$rest metadata health identity sharing pagecache"
parts=("$@")
[ $# != 0 ] || parts=(stock)

total=2
for part in "${parts[@]}"; do
	case $part in
	stock) total=$((total + ${#lints[@]} + 7)) ;;
	system) total=$((total + 5)) ;;
	kills) total=$((total + 4)) ;;
	both) total=$((total + ${#lints[@]} + 8)) ;;
	cpus) total=$((total + 5)) ;;
	forky) total=$((total + 6)) ;;
	debug | kcsan | soak) total=$((total + 7)) ;;
	*) die "usage: check.sh [stock | system | both | cpus | forky | debug | kcsan | kills | soak]..." ;;
	esac
done
alone
steps "$total"
set_up
for part in "${parts[@]}"; do
	[[ $part == @(stock|both) ]] || must "obdsetup" "$SCRIPTS/build-tools.sh"
	case $part in
	stock)
		user_space
		in_vm stock tests "${thirds[@]}" "$rest"
		;;
	system)
		rublk
		in_vm stock "system tests" system
		;;
	both)
		user_space
		rublk
		in_vm stock "all tests" "${thirds[0]}" "${thirds[1]} system" "$rest"
		;;
	cpus)
		QEMU_SMP=12 KERNEL_ARGS="maxcpus=4 isolcpus=2 nohz_full=3" \
			in_vm stock "tests with offline and isolated CPUs" cpus
		counts "a corrupt block panics the stock kernel where it has to" "$0" --panics stock
		;;
	kills)
		export OBD_KILLS=${OBD_KILLS:-50}
		TIMEOUT=7200 in_vm stock "$OBD_KILLS kills" system/kills
		;;
	forky) in_vm forky tests "${thirds[@]}" "$rest" ;;
	debug) OBD_SAMPLE=3 in_vm debug tests "${thirds[@]}" "$rest_of_module" ;;
	kcsan)
		# Not while it boots: run.sh switches the checker on. It looks at more accesses, for longer: the CPUs are slow.
		KERNEL_ARGS="kcsan.early_enable=0 kcsan.skip_watch=500 kcsan.udelay_task=1000 kcsan.udelay_interrupt=200" \
			in_vm kcsan "concurrent tests" "reads errors lifecycle cache" "faults races"
		;;
	soak)
		export OBD_SOAK_MINUTES=${MINUTES:-30}
		[[ $OBD_SOAK_MINUTES =~ ^[0-9]+$ ]] || die "MINUTES=$OBD_SOAK_MINUTES: must be a whole number"
		TIMEOUT=$((OBD_SOAK_MINUTES * 60 + 900)) in_vm debug "soak for $OBD_SOAK_MINUTES minutes" soak
		;;
	esac
done
finish
