# SPDX-License-Identifier: GPL-2.0
# Counts the results in KTAP logs: prints "passed failed", and a line "tests cause" for each cause of skipped tests.
# Only leaves count: the result of a test with subtests (which are indented by two more blanks) counts only if it
# failed and no subtest did. A plan ("1..N") counts as a failure if N is not the number of results.

function level(line) {
	match(line, /^ */)
	return int(RLENGTH / 2)
}

# close_subtests L: check the plans of the levels deeper than L, and forget these levels.
function close_subtests(l,   d) {
	for (d in seen)
		if (d + 0 > l) {
			check_plan(d)
			delete seen[d]
			delete plan[d]
			delete bad[d]
		}
}

# skip LINE: count the cause of a skipped test, which is the text after SKIP.
function skip(line) {
	sub(/.*# *[Ss][Kk][Ii][Pp][A-Za-z]*[: ]*/, "", line)
	causes[line == "" ? "no cause given" : line]++
}

# check_plan D: count a failure if level D has a plan that isn't the number of its results.
function check_plan(d) {
	if ((d in plan) && plan[d] != seen[d]) {
		failed++
		bad[d]++
	}
}

# Each file is a separate run.
FNR == 1 {
	for (d in seen)
		check_plan(d)
	delete seen
	delete plan
	delete bad
}

/^ *1\.\.[0-9]+/ {
	l = level($0)
	split($0, part, /\.\./)
	plan[l] = part[2] + 0
	seen[l] += 0
	if (plan[l] == 0)
		skip($0)
}

/^ *(not )?ok [0-9]+/ {
	l = level($0)
	notok = $0 ~ /^ *not ok/
	leaf = 1
	deeper_bad = 0
	for (d in seen)
		if (d + 0 > l)
			leaf = 0
	for (d in bad)
		if (d + 0 > l)
			deeper_bad += bad[d]
	before = failed
	close_subtests(l)
	deeper_bad += failed - before
	seen[l]++
	if ($0 ~ /# *[Ss][Kk][Ii][Pp]/) {
		if (leaf)
			skip($0)
	} else if (notok && $0 !~ /# *TODO/) {
		if (leaf || !deeper_bad)
			failed++
		bad[l]++
	} else if (leaf)
		passed++
}

END {
	for (d in seen)
		check_plan(d)
	print passed + 0, failed + 0
	for (cause in causes)
		print causes[cause], cause
}
