#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Run the tests, all or those named, on the running kernel with the module loaded: run.sh [NAME...]
# Prints KTAP, a subtest for each script. Whatever a script leaves behind is a failure of it.
set -u

cd "$(dirname "$0")" || exit 1
export PYTHONPYCACHEPREFIX=${TMPDIR:-/tmp}/obdtest.pycache PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/sbin:/sbin

MODULE=/sys/module/dm_overlaybd
COMPLAINTS="WARNING:|BUG:|Oops|Call Trace|INFO: task|lockdep|KASAN|UBSAN|refcount_t|detected stall|soft lockup"
FIRST=(golden malformed)

# scripts: names of all, the most telling first.
scripts() {
	local file
	printf '%s\n' "${FIRST[@]}"
	for file in *.py; do
		[[ " ${FIRST[*]} " == *" ${file%.py} "* ]] || echo "${file%.py}"
	done
}

# left_behind: devices, loops, mounts and users of the module, a line each.
left_behind() {
	local path
	for path in /sys/block/dm-*; do
		[ ! -e "$path/dm/name" ] || echo "mapped device $(<"$path/dm/name")"
	done
	for path in /sys/block/loop*/loop/backing_file; do
		[ ! -e "$path" ] || echo "loop device on $(<"$path")"
	done
	grep -o ' /tmp/obdtest[^ ]*' /proc/mounts | sed 's/^/mounted:/'
	if [ ! -e "$MODULE" ]; then
		echo "the module is not loaded"
	elif [ "$(<"$MODULE/refcnt")" != 0 ]; then
		echo "use count of the module: $(<"$MODULE/refcnt")"
	fi
}

# complaints MARK: what the kernel had to complain of since a line of its log.
complaints() {
	dmesg | awk -v mark="$1" 'index($0, mark) { seen = 1 } seen' | grep -E "$COMPLAINTS"
}

# run_one NAME: status 0 passed, 1 failed, 4 skipped.
run_one() {
	local mark="obdtest: $1 $RANDOM" status=0 left i
	echo "$mark" >/dev/kmsg
	"./$1.py" 2>&1 | sed 's/^/  /'
	status=${PIPESTATUS[0]}
	for ((i = 0; i < 40; i++)); do
		left=$(left_behind)
		[ -n "$left" ] || break
		sleep 0.05
	done
	left+=${left:+$'\n'}$(complaints "$mark")
	if [ -n "$left" ]; then
		head -n 12 <<<"$left" | sed "s/^/# $1 left behind: /"
		status=1
	fi
	return "$status"
}

mapfile -t names < <(scripts)
[ $# = 0 ] || names=("$@")
names=("${names[@]%.py}")

echo "KTAP version 1"
if [ "$(id -u)" != 0 ] || [ ! -e "$MODULE" ]; then
	echo "1..0 # SKIP needs root and the module dm_overlaybd"
	exit 4
fi
modprobe -qa loop brd dm-mod
echo "1..${#names[@]}"
failed=0 nr=0
for name in "${names[@]}"; do
	nr=$((nr + 1)) start=$SECONDS
	if [ ! -x "$name.py" ]; then
		echo "not ok $nr $name"
		echo "# there is no test $name"
		failed=1
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
exit "$failed"
