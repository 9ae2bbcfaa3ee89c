# SPDX-License-Identifier: GPL-2.0
# Prints the kernel's log without KCSAN's reports of races that don't concern the module: the kernel has many races of
# its own. A race concerns the module if the module makes one of the accesses, or calls the code that makes it. It does
# not if that code only interrupted the module, or processes a bio or work item that the module passed on. Nor does a
# race about a task's flags: an allocation with vmalloc changes them (memalloc_noio_save, for example), while the
# scheduler of another CPU (kthread_is_per_cpu) or an interrupt reads them.

/BUG: KCSAN/ { finish(); report = 1; flags = /__vmalloc_node_range|kthread_is_per_cpu/ }

# Messages from other CPUs in the middle of a report.
report && /WARNING:|BUG: [^K]|Oops|panic|INFO: task/ { print; next }

report {
	text = text $0 "\n"
	if (/ by (task|interrupt)/)
		calls = 1
	else if (/ (asm_(sysvec|common)_|submit_bio|bio_endio|queue_work)/)
		calls = 0
	else if (calls && /\[dm_overlaybd\]/)
		ours = 1
	if (/=====/)
		finish()
	next
}

{ print }

END { finish() }

function finish() {
	if (ours && !flags)
		printf "%s", text
	text = ""
	report = calls = ours = flags = 0
}
