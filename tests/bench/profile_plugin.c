// SPDX-License-Identifier: GPL-2.0
/*
 * A plugin of QEMU that counts the instructions that the guest's kernel
 * executes, for each 16 bytes of its text. It counts on one CPU, between two
 * marks: instructions that do nothing and that obd_bench executes before and
 * after what it measures.
 * -plugin FILE,dir=DIR: DIR is a share that the guest has, too. If the guest
 * makes a file "wanted" there that contains NAME, the plugin writes the counts
 * since the last such file to NAME.counts, and removes "wanted". Each line has
 * an address (hexadecimal) and a number of instructions. The address 0 stands
 * for all code that is not kernel text. The kernel must not be at a random
 * address (nokaslr).
 */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "qemu_plugin.h"

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

/* Addresses of the text of Linux and of its modules on x86-64; lengths in bytes. */
#define KERNEL 0xffffffff81000000ul
#define KERNEL_LEN (40ul << 20)
#define MODULES 0xffffffffc0000000ul
#define MODULES_LEN (24ul << 20)
/* A counter for this many bytes. Functions are aligned to it. */
#define GRAIN 16ul
#define COUNTERS (1 + (KERNEL_LEN + MODULES_LEN) / GRAIN)

#define count_inline qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu
#define call_at qemu_plugin_register_vcpu_insn_exec_cb

/* The start of a nopl with a displacement of 32 bits: see mark_begin() in obd_bench.c. */
static const unsigned char mark_code[3] = { 0x0f, 0x1f, 0x80 };
#define MARK_BEGIN 0x6264626fu
#define MARK_END 0x6564626fu

static struct qemu_plugin_scoreboard *counters;
/* The counters at the first mark, and what was counted between the marks. */
static unsigned long *before, *total;
static const char *dir;

/* Returns the number of the counter for an address. */
static size_t counter_of(unsigned long address)
{
	if (address - KERNEL < KERNEL_LEN)
		return 1 + (address - KERNEL) / GRAIN;
	if (address - MODULES < MODULES_LEN)
		return 1 + (KERNEL_LEN + address - MODULES) / GRAIN;
	return 0;
}

/* Returns the first address that a counter is for. */
static unsigned long address_of(size_t counter)
{
	unsigned long at = (counter - 1) * GRAIN;

	if (!counter)
		return 0;
	return at < KERNEL_LEN ? KERNEL + at : MODULES + at - KERNEL_LEN;
}

static void at_begin(unsigned int cpu, void *unused)
{
	memcpy(before, qemu_plugin_scoreboard_find(counters, cpu),
	       COUNTERS * sizeof(unsigned long));
}

static void at_end(unsigned int cpu, void *unused)
{
	const unsigned long *now = qemu_plugin_scoreboard_find(counters, cpu);
	size_t nth;

	for (nth = 0; nth < COUNTERS; nth++)
		total[nth] += now[nth] - before[nth];
}

static void look_for_mark(struct qemu_plugin_insn *insn)
{
	unsigned char code[7];
	unsigned int value;

	if (qemu_plugin_insn_data(insn, code, sizeof(code)) != sizeof(code) ||
	    memcmp(code, mark_code, sizeof(mark_code)))
		return;
	memcpy(&value, code + sizeof(mark_code), sizeof(value));
	if (value == MARK_BEGIN)
		call_at(insn, at_begin, QEMU_PLUGIN_CB_NO_REGS, NULL);
	else if (value == MARK_END)
		call_at(insn, at_end, QEMU_PLUGIN_CB_NO_REGS, NULL);
}

static void count_instructions(unsigned long id, struct qemu_plugin_tb *tb)
{
	size_t nth;

	for (nth = 0; nth < qemu_plugin_tb_n_insns(tb); nth++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, nth);
		unsigned long address = qemu_plugin_insn_vaddr(insn);
		struct qemu_plugin_u64 entry = {
			counters, counter_of(address) * sizeof(unsigned long)
		};

		look_for_mark(insn);
		count_inline(insn, QEMU_PLUGIN_INLINE_ADD_U64, entry, 1);
	}
}

/*
 * Writes what was counted between the marks since the last call. The name in the
 * file has no blanks. The guest waits until the file is removed.
 */
static void write_counts(FILE *wanted)
{
	char name[256], path[4096];
	size_t nth;
	FILE *out;

	/* The guest may not have written the name yet. */
	if (fscanf(wanted, "%255s", name) != 1)
		return;
	snprintf(path, sizeof(path), "%s/%s.counts", dir, name);
	out = fopen(path, "w");
	for (nth = 0; out && nth < COUNTERS; nth++) {
		if (total[nth])
			fprintf(out, "%lx %lu\n", address_of(nth), total[nth]);
	}
	if (!out || fclose(out))
		perror(path);
	memset(total, 0, COUNTERS * sizeof(unsigned long));
	snprintf(path, sizeof(path), "%s/wanted", dir);
	unlink(path);
}

static void *watch(void *unused)
{
	char wanted[4096];

	snprintf(wanted, sizeof(wanted), "%s/wanted", dir);
	for (;;) {
		FILE *file = fopen(wanted, "r");

		if (file) {
			write_counts(file);
			fclose(file);
		}
		usleep(2000);
	}
	return NULL;
}

EXPORT int qemu_plugin_install(unsigned long id, const struct qemu_info *info,
			       int argc, char **argv)
{
	pthread_t thread;

	if (argc != 1 || strncmp(argv[0], "dir=", 4))
		return -1;
	dir = strdup(argv[0] + 4);
	before = calloc(COUNTERS, sizeof(unsigned long));
	total = calloc(COUNTERS, sizeof(unsigned long));
	counters = qemu_plugin_scoreboard_new(COUNTERS * sizeof(unsigned long));
	if (!dir || !before || !total)
		return -1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, count_instructions);
	return pthread_create(&thread, NULL, watch, NULL) ? -1 : 0;
}
