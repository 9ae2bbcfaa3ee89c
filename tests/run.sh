#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs the tests on the running kernel with the module loaded: all, those named, or all but those named.
# run.sh [[--but] NAME...]
# OBD_BEGIN_WITHIN=SECONDS skips the scripts that have not begun after this time, but not the first one. The list then
# begins with another script each day, so that the skipped scripts are not always the same. With OBD_MOST, skipping most
# of the scripts is a failure.
# The tests in system/ need udev, systemd, LVM or the like, and run only if named: one as system/NAME, or all but those
# in NAMED as system.
# Prints KTAP with a subtest for each script. A script also fails if it leaves anything behind, or if the kernel's log
# has a complaint.
set -u

cd "$(dirname "$0")" || exit 1
export PYTHONPATH=$PWD PYTHONPYCACHEPREFIX=${TMPDIR:-/tmp}/obdtest.pycache PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/sbin:/sbin

MODULE=/sys/module/dm_overlaybd
KMEMLEAK=/sys/kernel/debug/kmemleak
KCSAN=/sys/kernel/debug/kcsan
PAGE_OWNER=/sys/kernel/debug/page_owner_stacks/show_stacks
COMPLAINTS="WARNING:|BUG:|Oops|Call Trace|INFO: task|lockdep|KASAN|UBSAN|refcount_t|pagealloc: |detected stall|soft lockup"
FIRST=(golden malformed)
# These run only if named.
NAMED=(panic soak system/nested system/guests)

# scripts [DIR/]: print the names of the scripts, except for those in NAMED. Those in FIRST come first.
scripts() {
	local file
	[ $# != 0 ] || printf '%s\n' "${FIRST[@]}"
	for file in "${1-}"*.py; do
		[[ " ${FIRST[*]} ${NAMED[*]} " == *" ${file%.py} "* ]] || echo "${file%.py}"
	done
}

# state: print mapped devices, loop devices, mounts of tests, and the use count of the module, a line each.
state() {
	local path
	for path in /sys/block/dm-*; do
		[ ! -e "$path/dm/name" ] || echo "mapped device $(<"$path/dm/name")"
	done
	for path in /sys/block/loop*/loop/backing_file; do
		[ ! -e "$path" ] || echo "loop device ${path//[^0-9]/} on $(<"$path")"
	done
	grep -o ' /tmp/obdtest[^ ]*' /proc/mounts | sed 's/^/mounted:/'
	if [ ! -e "$MODULE" ]; then
		echo "the module is not loaded"
	elif [ "$(<"$MODULE/refcnt")" != 0 ]; then
		echo "use count of the module: $(<"$MODULE/refcnt")"
	fi
}

# left_behind BEFORE: print the lines of the state that are not in BEFORE. Waits up to two seconds until there are none.
left_behind() {
	local now i
	for ((i = 0; i < 40; i++)); do
		now=$(comm -13 <(sort <<<"$1") <(state | sort))
		[ -n "$now" ] || return
		sleep 0.05
	done
	echo "$now"
}

# tidy: remove what a failed test has left, so that it doesn't affect the next tests.
tidy() {
	local path name _
	grep -o ' /tmp/obdtest[^ ]*' /proc/mounts | xargs -r umount
	for _ in 1 2 3 4; do
		for path in /sys/block/dm-*; do
			name=$(cat "$path/dm/name" 2>/dev/null)
			[[ $name != obdtest-* ]] || dmsetup remove "$name"
		done
	done >/dev/null 2>&1
	for path in /sys/block/loop*/loop/backing_file; do
		[[ $(cat "$path" 2>/dev/null) != */memfd:obdtest* ]] || losetup --detach "/dev/loop${path//[^0-9]/}"
	done >/dev/null 2>&1
}

# complaints MARK: print the kernel's complaints since the mark in its log, except those that a test checks itself.
complaints() {
	dmesg | awk -v mark="$1" '
		index($0, mark) { seen = 1; looks = / looks$/ }
		seen && !looks
		END { if (!seen || looks) print "BUG: messages of the kernel were lost or not checked" }' |
		awk -f kcsan.awk | grep -E "$COMPLAINTS"
}

# run_one NAME: run a script. Status 0: passed, 1: failed, 4: skipped.
run_one() {
	local mark="obdtest: $1 $RANDOM" status=0 before left
	before=$(state)
	echo "$mark" >/dev/kmsg
	OBD_LOG_MARK=$mark "./$1.py" 2>&1 | sed -u 's/^/  /'
	status=${PIPESTATUS[0]}
	left=$(
		left_behind "$before" | sed 's/^/left behind: /'
		lost_pages | sed 's/^/lost pages: /'
		complaints "$mark" | sed 's/^/kernel log: /'
	)
	if [ -n "$left" ]; then
		head -n 40 <<<"$left" | sed "s|^|# $1: |"
		status=1
	fi
	[ "$status" != 1 ] || tidy
	return "$status"
}

# scan_leaks: make kmemleak scan twice, after a pause: it reports only blocks that are at least 5 s old and have not
# changed since the scan before.
scan_leaks() {
	sleep 6
	echo scan >"$KMEMLEAK" && echo scan >"$KMEMLEAK"
}

# leaks NR: print the result of a test: kmemleak has found nothing since the tests began.
leaks() {
	if [ ! -w "$KMEMLEAK" ]; then
		echo "ok $1 no leaked memory # SKIP this kernel has no kmemleak"
		return
	fi
	if ! scan_leaks || dmesg | grep -E 'kmemleak: .*(disabled|Cannot allocate a kmemleak_object)'; then
		echo "# kmemleak has stopped working"
		echo "not ok $1 no leaked memory"
		failed=1
	elif grep -q . "$KMEMLEAK"; then
		head -n 60 "$KMEMLEAK" | sed 's/^/# /'
		echo "not ok $1 no leaked memory"
		failed=1
	else
		echo "ok $1 no leaked memory"
	fi
}

# lost_pages: print the call stacks in the module that allocated pages which were not freed. Pages that allocators and
# checkers keep don't count, nor does the codecs' working memory, which stays allocated. Frees the pages in the pool
# first.
lost_pages() {
	[ -r "$PAGE_OWNER" ] || return 0
	echo 2 >/proc/sys/vm/drop_caches
	awk -v RS= '/\[dm_overlaybd\]/ && !/allocate_slab|kasan_populate|stack_depot|pte_alloc|pcpu|codec7context/' \
		"$PAGE_OWNER"
}

# pages NR: print the result of a test: the kernel records the owners of pages, so that lost_pages, which runs after
# each script, can find any.
pages() {
	if [ ! -r "$PAGE_OWNER" ]; then
		echo "ok $1 owners of pages are known # SKIP this kernel has no page owners"
	elif grep -q allocate_slab "$PAGE_OWNER"; then
		echo "ok $1 owners of pages are known"
	else
		echo "not ok $1 owners of pages are known"
		failed=1
	fi
}

# checkers NR: print the result of a test: lockdep and KCSAN, if the kernel has them, were active to the end.
checkers() {
	local stopped=()
	[ ! -r /proc/lockdep_stats ] || grep -Eq 'debug_locks: +1' /proc/lockdep_stats || stopped+=(lockdep)
	[ ! -r "$KCSAN" ] || awk '/^enabled: 1/ { e = 1 } /^setup_watchpoints: [1-9]/ { w = 1 } END { exit !(e && w) }' \
		"$KCSAN" || stopped+=(KCSAN)
	if [ ! -r /proc/lockdep_stats ] && [ ! -r "$KCSAN" ]; then
		echo "ok $1 checkers were at work # SKIP this kernel has no checkers"
	elif [ "${#stopped[@]}" != 0 ]; then
		echo "# not at work: ${stopped[*]}"
		echo "not ok $1 checkers were at work"
		failed=1
	else
		echo "ok $1 checkers were at work"
	fi
}

mapfile -t names < <(scripts)
if [ "${1:-}" = --but ]; then
	mapfile -t names < <(scripts | grep -vxF "$(printf '%s\n' "${@:2}")")
elif [ $# != 0 ]; then
	names=()
	for name in "${@%.py}"; do
		if [ "$name" = system ]; then
			mapfile -tO "${#names[@]}" names < <(scripts system/)
		else
			names+=("$name")
		fi
	done
fi

if [ "${OBD_BEGIN_WITHIN:-}" ]; then
	first=$(($(date +%s) / 86400 % ${#names[@]}))
	names=("${names[@]:first}" "${names[@]:0:first}")
fi

echo "KTAP version 1"
if [ "$(id -u)" != 0 ] || [ ! -e "$MODULE" ]; then
	echo "1..0 # SKIP needs root and the module dm_overlaybd"
	exit 4
fi
modprobe -qa loop brd dm-mod
echo "1..$((${#names[@]} + 3))"
[ ! -w "$KCSAN" ] || echo on >"$KCSAN"
if [ -w "$KMEMLEAK" ]; then
	echo scan >"$KMEMLEAK"
	echo clear >"$KMEMLEAK"
fi
failed=0 nr=0 left_out=0
for name in "${names[@]}"; do
	nr=$((nr + 1)) start=$SECONDS
	if [ ! -x "$name.py" ]; then
		echo "not ok $nr $name"
		echo "# there is no test $name"
		failed=1
		continue
	fi
	if [ "${OBD_BEGIN_WITHIN:-}" ] && [ "$nr" -gt 1 ] && [ "$SECONDS" -ge "$OBD_BEGIN_WITHIN" ]; then
		left_out=$((left_out + 1))
		echo "ok $nr $name # SKIP no time left for $name"
		continue
	fi
	echo "  # Subtest: $name"
	run_one "$name"
	case $? in
	0) echo "ok $nr $name # $((SECONDS - start)) s" ;;
	4) echo "ok $nr $name # SKIP all of it" ;;
	*)
		echo "not ok $nr $name # $((SECONDS - start)) s"
		failed=1
		;;
	esac
done
leaks $((nr + 1))
pages $((nr + 2))
checkers $((nr + 3))
if [ "${OBD_MOST:-}" ] && [ $((2 * left_out)) -gt "${#names[@]}" ]; then
	echo "# there was no time for most of the scripts"
	failed=1
fi
exit "$failed"
