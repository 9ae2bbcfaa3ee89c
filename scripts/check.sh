#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs everything that a change has to pass: check.sh [PART...] [--within SECONDS PART...]... The last line has the
# numbers of passed tests, of failed ones, and of causes why tests were skipped. The parts after --within, up to the
# next --within, count as skipped if they cannot begin within SECONDS after the start of check.sh. LIMIT=SECONDS is the
# time for all parts: in its last 25 minutes, no test script begins in a VM, and those that have not begun count as
# skipped.
#   stock   lints, builds, tests in user space and, with Debian's kernel, in the VM (the default)
#   system  with Debian's kernel, in the VM: tests that combine parts of a system, in tests/system
#   both    stock and system at the same time
#   cpus    with Debian's kernel, in a VM with CPUs that are offline or isolated from boot: which CPUs run workers;
#           and in another VM: panic_on_corruption panics
#   icount  with Debian's kernel, on an emulated CPU: instructions of each kind of read, against the figures in
#           tests/bench/instructions.json
#   forky   lint and build of the module, and the tests in the VM, with the kernel and the tool chain of Debian forky
#   debug   the tests in the VM with the debug kernel, without those that mainly test obdsetup; of tests that are alike,
#           a third, different ones each day
#   kcsan   the tests with concurrency, with the KCSAN kernel
#   nested  with User-Mode Linux as the VM: tests that run QEMU inside the VM, with Debian's kernel
#   kills   with Debian's kernel, in the VM: tests that kill obdsetup, $OBD_KILLS (50) times in each way
#   soak    tests/soak.py for $MINUTES (30), with the debug kernel: random reads, faults, reloads and more, together
. "$(dirname "$0")/lib.sh"

passed=0 failed=0
# Number of skipped tests by cause.
declare -A causes=()

# show_causes NAME: print the causes in the array NAME, each with its number of tests.
show_causes() {
	local -n of=$1
	local cause tests
	for cause in "${!of[@]}"; do
		tests="tests"
		[ "${of[$cause]}" != 1 ] || tests="test"
		say "      skipped: $cause: ${of[$cause]} $tests"
	done | sort
}

# finish: print the numbers of passed tests, of failed ones, and of causes why tests were skipped, and exit.
finish() {
	show_causes causes
	say "$passed passed, $failed failed, ${#causes[@]} skipped"
	[ "$failed" = 0 ]
	exit
}

# must TITLE CMD...: run a step that everything after it needs.
must() {
	step "$@" && return
	failed=$((failed + 1))
	finish
}

# counts TITLE CMD...: run a step that counts as one test.
counts() {
	if step "$@"; then
		passed=$((passed + 1))
	else
		failed=$((failed + 1))
	fi
}

# add STATUS: print the results of a step's tests, read from standard input in ktap.awk's format, and add them to the
# sums. A step without a failed test counts as one failure if its STATUS is not 0 or no test has passed.
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

# cargo_results LOG: print cargo's results in ktap.awk's format. The cause of a skipped test is in the test's name, or
# in its attribute `ignore'.
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

# failures FILE...: print the failed results in KTAP logs with their diagnostic lines.
failures() {
	awk '
		/^ *#/ { if (lines++ < 40) text = text $0 "\n"; next }
		/^ *not ok / { printf "%s%s\n", text, $0 }
		{ text = ""; lines = 0 }' "$@" | sed 's/^/    /'
}

# there FILE...: fail if a file is missing or empty.
there() {
	local file
	for file; do
		[ -s "$file" ] || return
	done
}

# kernel_log_clean FILE...: fail, and print the lines, if a guest's kernel complained.
kernel_log_clean() {
	local log
	there "$@" && log=$(awk -f "$CLONE/tests/kcsan.awk" "$@") || return
	! grep -nE 'WARNING:|BUG:|Oops|Call Trace|KASAN|UBSAN|KCSAN|kmemleak: [0-9]+ new|unreferenced object|general protection|possible (circular|recursive)|inconsistent lock|suspicious RCU|pagealloc: |INFO: task .* blocked|detected stall|soft lockup|refcount_t:|Kernel panic|printk messages dropped' <<<"$log"
}

# nothing_skipped KERNEL FILE...: fail, and print the lines, if tests were skipped. A kernel made for the tests has what
# the tests need, except what takes long to build. Tests may be skipped that need this, or that unload a module of the
# kernel, since these kernels have such modules built in. Tests may also be skipped if images are missing, or if LIMIT
# leaves no time.
nothing_skipped() {
	local lacks='btrfs|xfs|IMA|io.max|tracing|cpuset'
	[ "$1" = debug ] || lacks+='|kmemleak|page owners'
	# It has no checkers: it runs virtual machines, with the stock kernel.
	[ "$1" != uml-host ] || lacks+='|checkers'
	shift
	there "$@" || return
	! grep -h '# SKIP' "$@" | grep -vE "# SKIP (no golden image|all of it${LIMIT:+|no time left for .*}|all CPUs were online at boot|[a-z_]+ is built into this kernel|this kernel has no ($lacks)\$)"
}

# instrumented KERNEL: fail unless the kernel's checker instruments the module's Rust code.
instrumented() {
	local calls=__asan_
	[ "$1" != kcsan ] || calls=__tsan_
	grep -q "$calls" "$BUILD"/*-"$1"/obj/rust/dm_overlaybd.o
}

# panics KERNEL: fail unless a corrupt block makes a guest panic if the table has panic_on_corruption, and only then.
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

# set_up: run the steps that all parts need.
set_up() {
	must "tool-chain root" "$SCRIPTS/make-root.sh"
	must "kernel and its Rust tree" "$SCRIPTS/make-kernel.sh"
}

# user_space: run the lints, build obdsetup, and run the tests that need no VM.
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
	# All targets but oci, whose build takes minutes: check-all.sh runs oci, too.
	RECORD='' counts "fuzz" "$SCRIPTS/fuzz.sh" 10 image codec merge lsmt zfile tar changes
}

# shellcheck disable=SC2317 # step calls it
# side_by_side TESTS...: run a VM for each list of tests, all in parallel. The output of each also goes to a file.
side_by_side() {
	local nth status=0 pids=()
	unset OBD_BEGIN_WITHIN OBD_MOST
	if [ -n "${LIMIT:-}" ]; then
		local TIMEOUT=$((SECONDS + 300 < LIMIT ? LIMIT - SECONDS : 300))
		export OBD_BEGIN_WITHIN=$((SECONDS < LIMIT - 1500 ? LIMIT - 1500 - SECONDS : 1))
		[ "$KERNEL" != stock ] || export OBD_MOST=y
	fi
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

# other_system: print the names of the system tests that are neither in long_system nor in nested.
other_system() {
	local file name names=()
	for file in "$CLONE"/tests/system/*.py; do
		name=system/$(basename "$file" .py)
		[[ " ${long_system[*]} ${nested[*]} " == *" $name "* ]] || names+=("$name")
	done
	say "${names[*]}"
}

# with_pmem COMMAND...: run it with VMs that have two pmem devices, for the test dax, and as much other memory as usual
# with Debian's kernel. QEMU_MEM: all memory, in MiB.
with_pmem() {
	KERNEL_ARGS=$PMEM QEMU_MEM=${QEMU_MEM:-2304} "$@"
}

# rublk: build the ublk server that a recipe in the system tests uses: Debian has none. Quick if it is built already.
rublk() {
	counts "rublk" "$SCRIPTS/in-root.sh" env -u CARGO_TARGET_DIR cargo install --locked rublk@0.2.13
}

# in_vm KERNEL TITLE TESTS...: run tests with that kernel, in a VM for each list.
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
	[[ -z $checks || $KERNEL = uml-host ]] || counts "the $KERNEL kernel checks the module's Rust code" "$0" --instrumented "$KERNEL"
	rm -f "$LOGS"/{vm,kernel}-"$KERNEL"-*.log
	step "$title with the $KERNEL kernel" side_by_side "$@" || status=$?
	results=$(awk -f "$SCRIPTS/ktap.awk" "$LOGS/vm-$KERNEL"-*.log)
	[[ $results =~ ^[0-9]+\ 0($|[^0-9]) ]] || failures "$LOGS/vm-$KERNEL"-*.log
	add "$status" <<<"$results"
	[ -z "$checks" ] ||
		counts "no test left out with the $KERNEL kernel" "$0" --nothing-skipped "$KERNEL" "$LOGS/vm-$KERNEL"-*.log
	counts "log of the $KERNEL kernel" "$0" --kernel-log "$LOGS/kernel-$KERNEL"-*.log
}

# time_for PART: if it is too late to begin PART, count it as skipped and fail.
time_for() {
	local within=${limits[$1]:-}
	[ -n "$within" ] && [ "$SECONDS" -ge "$within" ] || return 0
	say "left out: $1: not begun within $within s"
	causes["no time left for the part $1"]=1
	return 1
}

# debian_image: make an image of Debian for one of the system tests. That test is skipped if no mirror can be reached.
debian_image() { step "image of Debian" "$SCRIPTS/debian-image.sh" || :; }

read -ra lints <<<"$("$SCRIPTS/lint.sh" --list)"
export USE_ROOT=1 KDIR='' CARGO='' NOBUILD=1
# Each of these lists runs in a VM of its own, and the rest in a third VM: with the debug kernel, the three take about
# the same time.
thirds=("mutants memory" "injection golden faults")
# The test dax has a part of the VM's memory as pmem devices; the other tests do not use them.
PMEM="memmap=128M!1G memmap=128M!1280M"
rest="--but dax ${thirds[*]}"
# The longest system tests, which "both" runs in the VM that otherwise ends first.
long_system=(system/disks system/write)
# The system tests that run virtual machines in the VM. In the part nested, the VM is User-Mode Linux, so only the CPUs of
# these machines are emulated.
nested=(system/nested system/guests)
# Without the tests that mainly test obdsetup: they are left out with a slow kernel.
rest_of_module="$rest metadata health identity sharing pagecache"
parts=()
# Seconds within which a part must begin, by part.
declare -A limits=()
within=
while [ $# != 0 ]; do
	if [ "$1" = --within ]; then
		within=${2:-}
		[[ $within =~ ^[0-9]+$ ]] || die "--within $within: must be a whole number of seconds"
		shift
	else
		parts+=("$1")
		limits[$1]=$within
	fi
	shift
done
[ ${#parts[@]} != 0 ] || parts=(stock)

total=2
for part in "${parts[@]}"; do
	case $part in
	stock) total=$((total + ${#lints[@]} + 7)) ;;
	system) total=$((total + 6)) ;;
	kills) total=$((total + 4)) ;;
	nested) total=$((total + 7)) ;;
	both) total=$((total + ${#lints[@]} + 9)) ;;
	cpus) total=$((total + 5)) ;;
	icount) total=$((total + 2)) ;;
	forky) total=$((total + 6)) ;;
	debug | kcsan | soak) total=$((total + 7)) ;;
	*) die "usage: check.sh [stock | system | both | cpus | icount | forky | debug | kcsan | nested | kills | soak]... [--within SECONDS PART...]" ;;
	esac
done
alone
steps "$total"
set_up
for part in "${parts[@]}"; do
	time_for "$part" || continue
	[[ $part == @(stock|both) ]] || must "obdsetup" "$SCRIPTS/build-tools.sh"
	case $part in
	stock)
		user_space
		with_pmem in_vm stock tests "${thirds[0]}" "${thirds[1]} dax" "$rest"
		;;
	system)
		rublk
		debian_image
		with_pmem in_vm stock "system tests" "system dax"
		;;
	both)
		user_space
		rublk
		debian_image
		with_pmem in_vm stock "all tests" "${long_system[*]} ${thirds[0]}" "${thirds[1]} $(other_system) dax" "$rest"
		;;
	cpus)
		QEMU_SMP=12 KERNEL_ARGS="maxcpus=4 isolcpus=2 nohz_full=3" \
			in_vm stock "tests with offline and isolated CPUs" cpus
		counts "a corrupt block panics the stock kernel where it has to" "$0" --panics stock
		;;
	icount)
		counts "instructions of reads, no more than in the tree" \
			env VM=icount PARTS=block CPU_MODELS=erms UPDATE='' COMPARE='' PROFILE='' TIMEOUT=1200 "$SCRIPTS/bench.sh"
		;;
	nested)
		KERNEL=stock must "module for the stock kernel" "$SCRIPTS/build-module.sh"
		TIMEOUT=${TIMEOUT:-7200} in_vm uml-host "guests of the VM" "${nested[*]}"
		;;
	kills)
		export OBD_KILLS=${OBD_KILLS:-50}
		TIMEOUT=7200 in_vm stock "$OBD_KILLS kills" system/kills "${long_system[*]}"
		;;
	forky) in_vm forky tests "${thirds[@]}" "$rest" ;;
	# The debug kernel needs more memory, see kernel-test.sh.
	debug) OBD_SAMPLE=3 QEMU_MEM=${QEMU_MEM:-3328} with_pmem in_vm debug tests "${thirds[0]} dax" "${thirds[1]}" "$rest_of_module" ;;
	kcsan)
		# KCSAN is off at boot: run.sh switches it on. It watches more accesses than by default, and each one for
		# longer, because the CPUs are slow.
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
