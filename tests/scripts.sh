#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# shellcheck disable=SC2317,SC2016 # test calls the functions; other shells expand what is in quotes
# Tests of the scripts, in some seconds: unusual paths and environments, locks, interrupts, counting of results.
# Prints KTAP. Needs the tool-chain root, which 'make setup' makes.
set -u

cd "$(dirname "$0")/.." || exit
clone=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The part of the clone that these tests need, at a path that the kernel's build and QEMU would not accept.
odd="$work/it's a:b,c%20\$d/my clone"
mkdir -p "$odd"
cp -r Makefile scripts "$odd/"

number=0 failed=0
echo "KTAP version 1"
test() {
	local title=$1 said
	shift
	number=$((number + 1))
	if said=$("$@" 2>&1); then
		echo "ok $number $title"
	else
		echo "# ${said//$'\n'/$'\n'# }"
		echo "not ok $number $title"
		failed=1
	fi
}

# equal GOT WANTED
equal() {
	[ "$1" = "$2" ] || { diff <(echo "$2") <(echo "$1") && false; }
}

# soon CMD...: repeat the command until it succeeds, for up to half a minute, since the machine may be busy.
soon() {
	local _
	for _ in {1..300}; do
		! "$@" || return 0
		sleep 0.1
	done
	echo "not within 30 s: $*"
	return 1
}

help() {
	local made
	chmod -R a-w "$odd"
	made=$(cd "$work" && umask 077 && env -u HOME CDPATH=/:/usr LC_ALL=de_DE.UTF-8 make -C "$odd" help) || return
	chmod -R u+w "$odd"
	grep -q '^make check ' <<<"$made" && ! [ -e "$odd/build" ]
}

surroundings() {
	equal "$(cd "$odd" && env -u HOME CDPATH="$clone:/" XDG_CACHE_HOME=not/absolute \
		bash -c '. scripts/lib.sh; echo "$CLONE"; umask; [[ $CACHE == /*/.cache/dm-overlaybd ]] && printf %.1f 0.5')" \
		"$odd"$'\n0022\n0.5'
}

odd_place() {
	equal "$("$odd/scripts/in-root.sh" sh -c 'pwd; cat scripts/lib.sh')" "/clone"$'\n'"$(cat scripts/lib.sh)" &&
		equal "$("$odd/scripts/in-root.sh" cat "$odd/Makefile")" "$(cat Makefile)"
}

by_link() {
	ln -s "$odd" "$work/link"
	equal "$(cd "$work/link" && scripts/in-root.sh sh -c 'pwd; ls -d Makefile')" $'/clone\nMakefile'
}

# tools_of_the_machine: to build with a kernel tree of this machine, the clone is mounted at a path without blanks.
tools_of_the_machine() {
	equal "$(cd "$odd" && bash -c '. scripts/lib.sh; . scripts/kdir.sh; KDIR_IN_ROOT= KDIR_USED=/usr; kdir_place
		echo "$KDIR_CLONE"; kdir_run sh -c "cat $KDIR_CLONE/Makefile; id -u"')" "/mnt"$'\n'"$(cat Makefile; id -u)"
	[ ! -e /mnt/Makefile ] || return
	! (cd "$odd" && bash -c '. scripts/lib.sh; . scripts/kdir.sh; KDIR_IN_ROOT= KDIR_USED="/a b"; kdir_place') || return
}

# kernel_chosen KERNEL: print the release of the kernel that a module is built for if modules can be built for the running
# kernel, whose release is running.
kernel_chosen() {
	local tree=$work/kernels
	mkdir -p "$tree/include/config"
	echo running >"$tree/include/config/kernel.release"
	printf '#!/bin/sh\n' >"$tree/setup.sh"
	chmod +x "$tree/setup.sh"
	env -u KDIR -u USE_ROOT KERNEL="$1" bash -c '. scripts/lib.sh; . scripts/kdir.sh
		SCRIPTS=$0
		kdir_running() { say "$SCRIPTS"; }
		kdir_problems() { :; }
		kdir_compiler() { KDIR_ARGS=(); }
		kernel_select() { K_RELEASE=$KERNEL K_DIR=$SCRIPTS; }
		kdir_choose_tree >/dev/null
		say "$KDIR_RELEASE"' "$tree"
}

# kernels: KDIR and KERNEL together are refused; a KDIR that cannot be used is refused with what to do; a KERNEL is
# used even if modules can be built for the running kernel.
kernels() {
	local said or='KERNEL=stock instead of KDIR'
	equal "$(kernel_chosen '')" running && equal "$(kernel_chosen forky)" forky && equal "$(kernel_chosen stock)" stock || return
	said=$(KDIR=/usr KERNEL=forky scripts/build-module.sh 2>&1) && return 1
	grep -qF 'KDIR=/usr and KERNEL=forky name two kernels: leave one of them out' <<<"$said" || { echo "$said" && return 1; }
	said=$(KDIR=/usr KERNEL='' scripts/build-module.sh 2>&1) && return 1
	grep -qF 'cannot build for /usr: not a kernel tree. README.md' <<<"$said" || { echo "$said" && return 1; }
	grep -qF "$or" <<<"$said" || { echo "$said" && return 1; }
	# What is built for KERNEL is not installed without a DESTDIR.
	said=$(KDIR=/usr KERNEL='' DESTDIR='' scripts/build-module.sh install 2>&1) && return 1
	grep -qF 'cannot build for /usr: not a kernel tree. README.md' <<<"$said" || { echo "$said" && return 1; }
	! grep -qF "$or" <<<"$said" || { echo "$said" && return 1; }
}

# lock_of_a_step: a lock that a step takes is released at the end of the step.
lock_of_a_step() {
	(cd "$odd" && timeout 20 bash -c '. scripts/lib.sh
		take() { lock "$BUILD/some.lock" "test"; }
		steps 2
		step first take && step second flock -n "$BUILD/some.lock" true')
}

# two_at_once: a second run in a clone waits for the first, but a script that the first one calls doesn't wait.
two_at_once() {
	local order=$work/order run='. scripts/lib.sh; alone; echo "$0 begins" >>"$1"; bash -c ". scripts/lib.sh; alone"; sleep 0.7
		echo "$0 ends" >>"$1"'
	(cd "$odd" && { timeout 20 bash -c "$run" a "$order" & } && sleep 0.3 && timeout 20 bash -c "$run" b "$order" && wait)
	equal "$(cat "$order")" $'a begins\na ends\nb begins\nb ends'
}

# cache_is_free: no unfinished set-up is left, and the locks are free.
cache_is_free() {
	local lock
	for lock in "$work"/cache/dm-overlaybd/lock-*; do flock -n "$lock" true || return; done
	! ls -d "$work"/cache/dm-overlaybd/tmp-*
}

# cache_interrupted SIGNAL: interrupt a set-up, and check that it leaves nothing.
cache_interrupted() {
	local pid
	# Below nohup, HUP would be ignored.
	(cd "$odd" && XDG_CACHE_HOME=$work/cache exec env --default-signal="$1" bash -c '. scripts/lib.sh; . scripts/cache.sh
		trap - INT
		cache_begin "thing-$1"; mkdir "$TMP"; : >"$0"; for i in {1..200}; do sleep 0.1; done' "$work/begun" "$1") &
	pid=$!
	soon [ -e "$work/begun" ] || return
	rm "$work/begun"
	# A shell in the background ignores INT.
	kill "-$1" "$pid"
	wait "$pid"
	[ "$?" -gt 128 ] && soon cache_is_free
}

# step_interrupted SIGNAL: when a step is interrupted, all that it has started ends, even a command in the root that
# another script runs.
step_interrupted() {
	local seconds=398.$RANDOM$RANDOM pid status=0
	(cd "$odd" && exec env --default-signal="$1" bash -c '. scripts/lib.sh
		below_it() { bash -c "scripts/in-root.sh sleep $0; :"; }
		steps 1
		step "long one" below_it' "$seconds") &
	pid=$!
	soon running "$seconds" || return
	kill "-$1" "$pid"
	wait "$pid" || status=$?
	[ "$status" -gt 128 ] && soon gone "$seconds"
}

cache_twice() {
	(cd "$odd" && XDG_CACHE_HOME=$work/cache timeout 20 bash -c '. scripts/lib.sh; . scripts/cache.sh
		for i in 1 2; do
			! cache_begin thing-1 || { mkdir "$TMP"; cache_commit thing-1; }
			cache_begin "other-$i" && mkdir "$TMP" && cache_commit "other-$i"
		done') && soon cache_is_free && [ -d "$work/cache/dm-overlaybd/thing-1" ]
}

# running SECONDS: whether a `sleep SECONDS' runs.
running() {
	grep -slzx "$1" /proc/[0-9]*/cmdline | while read -r file; do
		cat "${file%/*}/comm"
	done 2>/dev/null | grep -qx sleep
}
gone() { ! running "$1"; }

# ends_with_caller SIGNAL: a command in the root ends with its caller.
ends_with_caller() {
	local seconds=397.$RANDOM$RANDOM pid
	bash -c 'scripts/in-root.sh sleep "$0"; :' "$seconds" &
	pid=$!
	soon running "$seconds" || return
	kill "-$1" "$pid"
	wait "$pid"
	soon gone "$seconds"
}

ktap() {
	printf '%s\n' "KTAP version 1" 1..5 "  # Subtest: a" "  KTAP version 1" "  1..4" "  ok 1 x" "  ok 2 y # SKIP no thing" \
		"  ok 3 z # SKIP no thing" "  not ok 4 u" "not ok 1 a" "  # Subtest: b" "  KTAP version 1" "  1..0 # SKIP no other thing" \
		"ok 2 b # SKIP all of it" "  KTAP version 1" "  1..2" "  ok 1 v # SKIP no thing" "  ok 2 w # SKIP no other thing" \
		"ok 3 c # SKIP all of it" "ok 4 d" "  1..2" "  ok 1 t" "ok 5 e" >"$work/ktap"
	# The plan of e has two tests, but only one has a result.
	equal "$(awk -f scripts/ktap.awk "$work/ktap" | sort)" $'2 no other thing\n3 2\n3 no thing' || return
	equal "$(awk -f scripts/ktap.awk "$work/ktap" "$work/ktap" | sort)" $'4 no other thing\n6 4\n6 no thing'
}

cargo() {
	printf '%s\n' "test one ... ok" "test a (skipped: no golden images, see OBD_GOLDENS)   ... ignored" \
		"test b (skipped: no golden images, see OBD_GOLDENS) ... ignored" "test c ... ignored, no machine" "test d ... ignored" \
		"test result: ok. 1 passed; 0 failed; 4 ignored; 0 measured" "test result: FAILED. 2 passed; 1 failed; 0 ignored" \
		>"$work/cargo"
	equal "$(scripts/check.sh --cargo-results "$work/cargo" | sort)" \
		$'1 ignored unless cargo test is asked for it\n1 no machine\n2 no golden images, see OBD_GOLDENS\n3 1'
}

# race WHAT FRAME...: print a report of KCSAN about a race WHAT between a task with these frames and an interrupt.
race() {
	printf '%s\n' "BUG: KCSAN: data-race in $1" "" "write to 0xffff888000e3d72c of 4 bytes by task 919 on cpu 0:" \
		"${@:2}" "" "read to 0xffff888000e3d72c of 4 bytes by interrupt on cpu 1:" " scheduler_tick+0x1/0x2" \
		"==================================================================" "next line"
}

kcsan() {
	local ours=" read_done+0x1/0x2 [dm_overlaybd]"
	race "a / b" " vmalloc+0x1/0x2" "$ours" " submit_bio+0x1/0x2" >"$work/kcsan-called"
	race "a / b" " complete_all+0x1/0x2" " bio_endio+0x1/0x2" "$ours" >"$work/kcsan-passed-on"
	race "capable / kthread_is_per_cpu" " capable+0x1/0x2" "$ours" >"$work/kcsan-flags"
	race "__vmalloc_node_range_noprof / rcu_core" " vmalloc+0x1/0x2" "$ours" >>"$work/kcsan-flags"
	! scripts/check.sh --kernel-log "$work/kcsan-called" >/dev/null || return
	scripts/check.sh --kernel-log "$work/kcsan-passed-on" && scripts/check.sh --kernel-log "$work/kcsan-flags" || return
	# Nothing else is left out.
	equal "$(awk -f tests/kcsan.awk "$work/kcsan-flags")" $'next line\nnext line' || return
	! cat "$work/kcsan-flags" "$work/kcsan-called" | scripts/check.sh --kernel-log /dev/stdin >/dev/null
}

# stubbed_check PART...: run check.sh in a copy of scripts/, in which stubs replace the scripts that it calls. The stub
# of the VM prints KTAP with a failed and a skipped test.
stubbed_check() {
	local copy=$work/stubbed name
	mkdir -p "$copy/tests"
	cp -r scripts "$copy/"
	cp tests/kcsan.awk "$copy/tests/"
	for name in make-root make-kernel build-module build-tools in-root fuzz; do
		printf '#!/bin/sh\n' >"$copy/scripts/$name.sh"
	done
	printf '#!/bin/sh\n[ "$1" != --list ] || echo one two\n' >"$copy/scripts/lint.sh"
	cat >"$copy/scripts/build-tools.sh" <<-'END'
		#!/bin/sh
		[ "$1" != test ] || echo "test a (skipped: no golden images, see OBD_GOLDENS) ... ignored"
		[ "$1" != test ] || echo "test result: ok. 7 passed; 0 failed; 1 ignored"
	END
	printf '#!/bin/sh\nprintf "1..1\\nok 1 x\\n"\n' >"$copy/tests/scripts.sh"
	cat >"$copy/scripts/vm.sh" <<-'END'
		#!/bin/sh
		printf '%s\n' 1..3 "ok 1 a" "ok 2 b # SKIP no golden images, see OBD_GOLDENS" "# why" "not ok 3 c"
		echo fine >"$VM_LOG"
		exit 1
	END
	chmod -R +x "$copy/scripts" "$copy/tests"
	(cd "$copy" && STEP_TAIL=0 timeout 60 scripts/check.sh "$@")
}

sums() {
	local said status=0
	said=$(stubbed_check stock) || status=$?
	equal "$status" 1 || return
	equal "$(grep -v '^\[' <<<"$said")" '      7 passed, 0 failed, 1 skipped
      skipped: no golden images, see OBD_GOLDENS: 1 test
      1 passed, 0 failed, 0 skipped
    # why
    not ok 3 c
    # why
    not ok 3 c
    # why
    not ok 3 c
      3 passed, 3 failed, 1 skipped
      skipped: no golden images, see OBD_GOLDENS: 3 tests
      skipped: no golden images, see OBD_GOLDENS: 4 tests
15 passed, 3 failed, 1 skipped'
}

# too_late: a part that cannot begin in time is skipped; other parts run.
too_late() {
	local said status=0
	said=$(stubbed_check --within 0 kills debug) || status=$?
	equal "$status" 0 || return
	equal "$(tail -n 5 <<<"$said" | grep -v '^\[')" 'left out: kills: not begun within 0 s
left out: debug: not begun within 0 s
      skipped: no time left for the part debug: 1 test
      skipped: no time left for the part kills: 1 test
0 passed, 0 failed, 2 skipped' || return
	said=$(stubbed_check kills --within 0 debug) && return 1
	grep -q '50 kills with the stock kernel' <<<"$said" || return
	said=$(stubbed_check --within 3000 kills) && return 1
	grep -q '50 kills with the stock kernel' <<<"$said" || return
	said=$(stubbed_check --within soon kills 2>&1) && return 1
	equal "$said" "error: --within soon: must be a whole number of seconds"
}

# counts KERNEL LINEAR LSMT: print what the benchmark has counted, in one row of two devices. An outlier changes nothing.
counts() {
	local device n out=()
	for device in "linear:$2" "lsmt-raw:$3"; do
		n=${device#*:}
		out+=("\"${device%:*}\": [{\"ns\": $((n * 10)), \"requests\": 10}, {\"ns\": $n, \"requests\": 1},
			{\"ns\": $((n * 9)), \"requests\": 1}]")
	done
	echo "{\"kernel\": \"$1\", \"rows\": {\"4k\": {${out[0]}, ${out[1]}}}}"
}

# instructions: reads may cost up to 2 % more than in the tree; with another kernel, relative to its own code.
instructions() {
	local dir=$work/instructions
	judge() {
		counts "$1" "$2" "$3" >"$dir/icount-erms.json"
		OBD_INSTRUCTIONS=/srv/figures scripts/in-root.sh -b "$dir:/srv" tests/bench/instructions.py /srv "${@:4}" >"$dir/said"
	}
	mkdir "$dir"
	judge a 1000 2000 && return 1
	grep -qx 'erms: costs more: 4k, lsmt-raw: 2000, and no figure' "$dir/said" || return
	judge a 1000 2000 update && judge a 1000 2040 && judge a 1000 1000 || return
	judge a 1000 2041 && return 1
	grep -qx 'erms: costs more: 4k, lsmt-raw: 2000 -> 2041 (+2.0%)' "$dir/said" || return
	# Code of others is only reported.
	judge a 2000 2000 && grep -qx 'erms: differs: 4k, linear: 1000 -> 2000 (+100.0%)' "$dir/said" || return
	judge b 2000 4080 || return
	judge b 2000 4100 && return 1
	grep -qx 'erms: costs more: 4k, lsmt-raw / code of others: 2.000 -> 2.050 (+2.5%)' "$dir/said"
}

# pictures: each picture exists and matches its source; a mismatch is reported.
pictures() {
	local copy=$work/pictures said none=$work/none
	scripts/pictures.sh --check || return
	mkdir -p "$copy/Documentation" "$none"
	cp -r scripts "$copy/"
	cp -r Documentation/pictures "$copy/Documentation/"
	echo >>"$copy/Documentation/pictures/stack.dot"
	said=$("$copy/scripts/pictures.sh" --check 2>&1) && return 1
	equal "$said" "Documentation/pictures/stack.dot: its SVG is out of date: run 'make pictures'" || return
	ln -s "$(command -v dirname)" "$(command -v id)" "$none/"
	said=$(PATH=$none "$copy/scripts/pictures.sh" 2>&1) && return 1
	equal "$said" "error: dot is missing: install Graphviz (Debian: apt install graphviz)"
}

# document_links FILE: print the relative links in a document.
document_links() {
	case $1 in
	*.md) grep -oE '\]\([^)]+\)|src="[^"]+"' "$1" | sed -E 's/^(\]\(|src=")//; s/[)"]$//' ;;
	*.rst)
		tr '\n' ' ' <"$1" | grep -oE '`[^`]*<[^`>]+>`__' | sed 's/.*<//; s/>`__$//'
		sed -nE 's/^ *\.\. (figure|image):: *//p' "$1"
		;;
	esac | sed 's/#.*//' | grep -vE '^$|^[a-z]+:' | sort -u
}

# documents: links lead to existing files, and the index has all documents.
documents() {
	local document link bad=0
	for document in ./*.md Documentation/*.rst Documentation/*/*.rst; do
		while read -r link; do
			[ -e "${document%/*}/$link" ] || { echo "$document: no $link" && bad=1; }
		done < <(document_links "$document")
	done
	for document in Documentation/*.rst; do
		document=${document##*/}
		[ "$document" = index.rst ] || document_links Documentation/index.rst | grep -qxF "$document" ||
			{ echo "Documentation/index.rst: no $document" && bad=1; }
	done
	return "$bad"
}

# versions: the packages, obdsetup and the documents have the version in dkms.conf, which is also the module's.
versions() {
	local version bad=0
	version=$(sed -n 's/^PACKAGE_VERSION="\(.*\)"$/\1/p' dkms.conf)
	[ -n "$version" ] || { echo "dkms.conf: no version" && return 1; }
	grep -qx "version = \"$version\"" tools/Cargo.toml || { echo "tools/Cargo.toml: not $version" && bad=1; }
	head -n 1 packaging/deb/changelog | grep -qF "($version-" || { echo "packaging/deb/changelog: not $version" && bad=1; }
	grep -q "^$version," NEWS || { echo "NEWS: no $version" && bad=1; }
	if grep -oE 'dm-overlaybd[-/][0-9.]+[0-9]' Documentation/install.rst | grep -vE "[-/]$version$"; then bad=1; fi
	return "$bad"
}

echo "1..$(grep -c '^test "' tests/scripts.sh)"
test "help in a read-only clone" help
test "the caller's environment has no effect" surroundings
test "a clone with unusual characters in its path" odd_place
test "a clone through a symbolic link" by_link
test "a kernel tree of this machine, and a clone with unusual characters in its path" tools_of_the_machine
test "KDIR and KERNEL" kernels
test "a step's lock ends with the step" lock_of_a_step
test "two runs at the same time in a clone" two_at_once
test "an interrupted set-up leaves nothing: TERM" cache_interrupted TERM
test "an interrupted set-up leaves nothing: HUP" cache_interrupted HUP
test "an interrupted step ends everything that it has started: TERM" step_interrupted TERM
test "an interrupted step ends everything that it has started: HUP" step_interrupted HUP
test "one process makes several things in the cache" cache_twice
test "a command in the root ends with its caller: TERM" ends_with_caller TERM
test "a command in the root ends with its caller: KILL" ends_with_caller KILL
test "causes of skipped tests: KTAP" ktap
test "causes of skipped tests: cargo" cargo
test "which races of KCSAN concern the module" kcsan
test "sums of make check" sums
test "a part of make check that is too late" too_late
test "instructions of reads against the figures in the tree" instructions
test "pictures are up to date" pictures
test "links between documents" documents
test "all files have the same version" versions
exit "$failed"
