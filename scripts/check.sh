#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Everything a change has to pass: set-up, lints, builds, tests. The last line sums it all up.
. "$(dirname "$0")/lib.sh"

passed=0 failed=0 skipped=0

finish() {
	say "$passed passed, $failed failed, $skipped skipped"
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

# add PASSED FAILED SKIPPED STATUS: what a step's tests came to; a failure that none of them shows is one more.
add() {
	passed=$((passed + $1))
	failed=$((failed + $2))
	skipped=$((skipped + $3))
	say "      $1 passed, $2 failed, $3 skipped"
	if [ "$4" != 0 ] && [ "$2" = 0 ]; then
		failed=$((failed + 1))
	fi
}

cargo_results() {
	awk '/^test result:/ { p += $4; f += $6; s += $8 } END { print p + 0, f + 0, s + 0 }' "$1"
}

# kernel_log_clean FILE: fail, and show it, when the guest's kernel complained.
kernel_log_clean() {
	! grep -nE 'WARNING:|BUG:|Oops|Call Trace|KASAN|UBSAN|KCSAN|kmemleak: [0-9]+ new|unreferenced object|general protection|possible (circular|recursive)|inconsistent lock|suspicious RCU|INFO: task .* blocked|detected stall|soft lockup|refcount_t:|Kernel panic' "$1"
}

if [ "${1:-}" = --kernel-log ]; then
	kernel_log_clean "$2"
	exit
fi

read -ra lints <<<"$("$SCRIPTS/lint.sh" --list)"
export USE_ROOT=1 KDIR='' CARGO='' NOBUILD=1
kernel_log=$LOGS/kernel.log
rm -f "$kernel_log"

steps $((7 + ${#lints[@]}))
must "tool-chain root" "$SCRIPTS/make-root.sh"
must "kernel and its Rust tree" "$SCRIPTS/make-kernel.sh"
for lint in "${lints[@]}"; do
	counts "lint: $lint" "$SCRIPTS/lint.sh" "$lint"
done
must "module" "$SCRIPTS/build-module.sh"
must "obdsetup" "$SCRIPTS/build-tools.sh"

status=0
step "cargo tests" "$SCRIPTS/build-tools.sh" test || status=$?
read -r p f s <<<"$(cargo_results "$STEP_LOG")"
add "$p" "$f" "$s" "$status"

status=0
RUN=tests/run.sh SHARE='' TIMEOUT=${TIMEOUT:-2400} VM_LOG=$kernel_log \
	step "tests in the VM" "$SCRIPTS/vm.sh" || status=$?
read -r p f s <<<"$(awk -f "$SCRIPTS/ktap.awk" "$STEP_LOG")"
[ "$f" = 0 ] || grep -E '^ *not ok ' "$STEP_LOG" | sed 's/^/    /'
add "$p" "$f" "$s" "$status"
counts "kernel log of the VM" "$0" --kernel-log "$kernel_log"
finish
