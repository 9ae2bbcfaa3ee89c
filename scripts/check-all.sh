#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs the checks that CI does not run, or not always, one after the other: check-all.sh. PARTS='NAME...' selects some.
# Ends with a line for each part and a list of what was left out. Needs 40 GB of cache if it is empty. On two CPUs, with
# all kernels in the cache, it takes some three hours, and longer with the part kills: 50 kills in each of 23 tests.
. "$(dirname "$0")/lib.sh"

ALL=(debug forky kcsan boot deb nested soak kills fuzz bench)
SOAK_MINUTES=5 FUZZ_SECONDS=120

# run_PART: run a part.
run_debug() { "$SCRIPTS/check.sh" debug; }
run_forky() { "$SCRIPTS/check.sh" forky; }
run_kcsan() { "$SCRIPTS/check.sh" kcsan; }
run_boot() { "$SCRIPTS/check-boot.sh"; }
run_deb() { "$SCRIPTS/check-deb.sh"; }
run_nested() { "$SCRIPTS/check.sh" nested; }
run_soak() { MINUTES=${MINUTES:-$SOAK_MINUTES} "$SCRIPTS/check.sh" soak; }
run_kills() { "$SCRIPTS/check.sh" kills; }
run_fuzz() { "$SCRIPTS/fuzz.sh" "$FUZZ_SECONDS"; }
run_bench() {
	VM=uml PARTS=latency COMPARE='' "$SCRIPTS/bench.sh" &&
		VM=tools RUNS=1 OBD_TREE_MIB=16 COMPARE='' "$SCRIPTS/bench.sh"
}

# left_out PART: print what a part leaves out, and the command that runs it in full.
left_out() {
	case $1 in
	debug) say "two thirds of the tests that are alike (OBD_SAMPLE_FIRST= chooses which), and those that mainly test obdsetup, with the debug kernel" ;;
	forky | kcsan | boot | deb | nested | kills) ;;
	soak) say "soak for longer than ${MINUTES:-$SOAK_MINUTES} minutes: make soak MINUTES=" ;;
	fuzz) say "fuzz for longer than $FUZZ_SECONDS s a target: make fuzz SECONDS=" ;;
	bench) say "bench but for latency and for 16 MiB of files: make bench, make bench VM=qemu, make bench VM=icount, make bench VM=tools" ;;
	esac
}

parts=("${ALL[@]}")
# This PARTS is not that of bench.
[ -z "${PARTS:-}" ] || read -ra parts <<<"$PARTS"
unset PARTS KERNEL KDIR
for part in "${parts[@]}"; do
	declare -F "run_$part" >/dev/null || die "PARTS: no part $part; there are: ${ALL[*]}"
done

need_places
need_root
mkdir -p "$LOGS"
summary=() failed=0
for part in "${parts[@]}"; do
	say "== $part"
	log=$LOGS/check-all-$part.log start=$SECONDS status=0
	"run_$part" </dev/null 2>&1 | tee "$log" || status=${PIPESTATUS[0]}
	verdict=passed
	[ "$status" = 0 ] || verdict=FAILED failed=$((failed + 1))
	summary+=("$(printf '%-6s %s in %d min: %s' "$part" "$verdict" "$(((SECONDS - start + 59) / 60))" "$(last_line "$log" 100)")")
done
say "== check-all"
printf '%s\n' "${summary[@]}"
for part in "${ALL[@]}"; do
	if [[ " ${parts[*]} " != *" $part "* ]]; then
		say "left out: $part: not in PARTS"
	else
		left_out "$part" | sed 's/^/left out: /'
	fi
done
for part in "${parts[@]}"; do
	grep -hE '^ *skipped: ' "$LOGS/check-all-$part.log" | sed "s/^ */left out: $part: /" | sort -u || :
done
say "left out: check, check-system: CI runs them; to run them on this machine: .ci/run"
say "$((${#parts[@]} - failed)) passed, $failed failed"
[ "$failed" = 0 ]
