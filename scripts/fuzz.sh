#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs the fuzz targets for some seconds each, as many in parallel as there are CPUs: fuzz.sh [SECONDS|-b
# [TARGET...]] (-b: build only). For oci, all of obdsetup is built once more, which takes minutes. The last lines are
# the results. With RECORD=FILE, a line for each target is appended to FILE, too.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"

CARGO_FUZZ=0.13.1
TARGETS=(image codec merge lsmt zfile tar changes oci)
# Limits besides the targets' own checks: seconds for one input, MiB for the process, bytes of an input.
LIMITS=(-timeout=10 -rss_limit_mb=512 -max_len=8192)

RECORD=${RECORD:+$(realpath -m "$RECORD")}
# These paths are relative to the clone, which is the current directory here and in the tool-chain root.
cd "$CLONE"
out=build/fuzz
bin=$out/x86_64-unknown-linux-gnu/release
# libFuzzer keeps inputs that reach new code here, for the next run.
corpus=$CACHE/fuzz

# build: install cargo-fuzz in the cache, unless it is there, and build the targets.
build() {
	[ -x "$CACHE/cargo/cargo-fuzz-$CARGO_FUZZ/bin/cargo-fuzz" ] ||
		"$SCRIPTS/in-root.sh" env -u CARGO_TARGET_DIR cargo install --quiet --locked --debug \
			--root "/cargo/cargo-fuzz-$CARGO_FUZZ" --version "$CARGO_FUZZ" cargo-fuzz
	mkdir -p "$out"
	# No sanitizer: Debian's rustc has none, and the code under test has no unsafe.
	local features=()
	[[ " ${TARGETS[*]} " != *" oci "* ]] || features=(--features images)
	"$SCRIPTS/in-root.sh" env -C tools "CARGO_TARGET_DIR=$IN_ROOT/$out" \
		"PATH=/cargo/cargo-fuzz-$CARGO_FUZZ/bin:/usr/bin:/bin" \
		cargo fuzz build --sanitizer none "${features[@]}"
}

# run TARGET: write the target's seeds, then fuzz for $seconds; the output goes to a log. Returns libFuzzer's status.
run() {
	local target=$1 log=$LOGS/fuzz-$1.log
	mkdir -p "$corpus/$target" "$out/seeds/$target" "$out/findings"
	"$SCRIPTS/in-root.sh" env OBD_SEEDS="$out/seeds/$target" "$bin/$target" -runs=0 >"$log" 2>&1 || return
	"$SCRIPTS/in-root.sh" -b "$corpus/$target:/srv" "$bin/$target" \
		"${LIMITS[@]}" -max_total_time="$seconds" -print_final_stats=1 \
		-artifact_prefix="$out/findings/$target-" /srv "$out/seeds/$target" >>"$log" 2>&1
}

# stat_of NAME LOG: print a number of libFuzzer's final statistics.
stat_of() { awk -v name="stat::$1:" '$1 == name { n = $2 } END { print n + 0 }' "$2"; }

# report TARGET STATUS SECONDS: print a line with the results, and add one to the record; of a failure, print the cause
# and the input.
report() {
	local target=$1 log=$LOGS/fuzz-$1.log findings=0 verdict="no finding" runs peak inputs cov
	[ "$2" = 0 ] || findings=1 verdict=FAILED
	runs=$(stat_of number_of_executed_units "$log")
	peak=$(stat_of peak_rss_mb "$log")
	cov=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
	inputs=$(sed -n 's/.* corp: \([0-9]*\).*/\1/p' "$log" | tail -n 1)
	printf '%-7s %11d runs in %d s, %d/s; corpus %d, coverage %d; %d MiB; %s\n' "$target" "$runs" "$3" \
		"$((runs / ($3 > 0 ? $3 : 1)))" "${inputs:-0}" "${cov:-0}" "$peak" "$verdict"
	if [ -n "${RECORD:-}" ]; then
		[ -s "$RECORD" ] || printf '# date\tcommit\ttarget\truns\tseconds\tpeak MiB\tfindings\n' >"$RECORD"
		printf '%s\t%s\t%s\t%d\t%d\t%d\t%d\n' "$(date -u +%F)" "$commit" "$target" "$runs" "$3" "$peak" \
			"$findings" >>"$RECORD"
	fi
	[ "$findings" = 1 ] || return 0
	failed=1
	local input
	input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
	{ grep -m 1 -A 1 'panicked at' "$log" || grep -m 1 -E 'SUMMARY: libFuzzer|ERROR|error' "$log" || :; } |
		sed 's/^/       /'
	if [ -n "$input" ]; then
		say "       input: $input"
		say "       reproduce: scripts/in-root.sh $bin/$target $input"
	else
		say "       log: $log"
	fi
}

seconds=${1:-60}
shift || :
[[ $seconds =~ ^([1-9][0-9]*|-b)$ ]] || die "not a number of seconds: $seconds"
for target; do
	[[ " ${TARGETS[*]} " = *" $target "* ]] || die "no fuzz target $target; there are: ${TARGETS[*]}"
done
[ $# = 0 ] || TARGETS=("$@")

alone
"$SCRIPTS/setup.sh"
mkdir -p "$LOGS"
build
[ "$seconds" != -b ] || exit 0
commit=$(git -c safe.directory="*" -C "$CLONE" describe --always --dirty --abbrev=12 2>/dev/null || say unknown)

failed=0
declare -A names=() starts=()
# wait_one: wait until one target ends, and report it.
wait_one() {
	local pid status=0
	wait -n -p pid || status=$?
	report "${names[$pid]}" "$status" "$((SECONDS - starts[$pid]))"
	unset "names[$pid]"
}
for target in "${TARGETS[@]}"; do
	[ "${#names[@]}" -lt "$(nproc)" ] || wait_one
	run "$target" &
	names[$!]=$target starts[$!]=$SECONDS
done
while [ "${#names[@]}" -gt 0 ]; do wait_one; done
exit "$failed"
