// SPDX-License-Identifier: GPL-2.0
/*
 * Generates load for benchmarks in the kernel: on User-Mode Linux, where the
 * kernel is a process, a system call costs more than a small read.
 *
 * A command is written to obd_bench/run in debugfs. The write returns when the
 * command has ended; the file then has its figures, one "name value" per line:
 *
 *   bio DEV PLAN DEPTH THREADS
 *	reads the ranges of PLAN, split among threads, DEPTH at a time
 *   codec DEV PLAN ALGORITHM CRC
 *	decompresses the ranges of PLAN from memory; computes CRCs if CRC is 1
 *   file LIST PLAN BYTES THREADS KEEP
 *	reads files named in LIST, one per line, BYTES at a time; opens all
 *	of them once at the start if KEEP is 1, else one for each range
 *   beside DEV PLAN MS PAUSE OTHER SCAN DEPTH
 *	reads the ranges of PLAN one at a time for MS milliseconds, each after a
 *	pause of PAUSE microseconds on average; meanwhile, another thread reads
 *	the ranges of the plan SCAN from OTHER, DEPTH at a time, unless DEPTH is
 *	0. Both threads are bound to the same CPU
 *   storm MS
 *	for MS milliseconds in each of six phases, two CPUs interrupt each other
 *	or wake each other up, in five of them with timers that interrupt both;
 *	counts what came late or not at all. It tests the kernel, not a device
 *
 * PLAN is a file of struct piece. It is read before the measurement starts.
 * At the end of a plan, beside continues at its beginning.
 * Callers repeat commands, and drop caches between them, themselves.
 */
#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/crc32.h>
#include <linux/debugfs.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hrtimer.h>
#include <linux/interrupt.h>
#include <linux/kernel_read_file.h>
#include <linux/kthread.h>
#include <linux/lz4.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/sched/task.h>
#include <linux/sizes.h>
#include <linux/smp.h>
#include <linux/sort.h>
#include <linux/vmalloc.h>
#include <linux/zstd.h>

/* A read's memory is in chunks of this order, as in the page cache. */
#define CHUNK_ORDER 4
#define CHUNK_BYTES (PAGE_SIZE << CHUNK_ORDER)
#define MAX_BYTES SZ_1M
#define MAX_CHUNKS (MAX_BYTES / CHUNK_BYTES)
#define MAX_DEPTH 256
#define MAX_THREADS 16
#define MAX_FILES 1000000
#define MAX_TIMES 65536

static const char blanks[] = { ' ', '\n', '\0' };

struct piece {
	u64 offset;	/* bytes */
	u32 len;	/* bytes to read; codec: stored bytes of a block */
	u32 extra;	/* codec: bytes of the block; file: number in LIST */
};

struct plan {
	struct piece *ranges;
	size_t count;
	u32 max_len;
	u32 max_extra;
};

/*
 * Marks for profile_plugin.c, which counts the instructions between them: each is
 * an instruction of x86-64 that does nothing, with a number in it.
 */
static inline void mark_begin(void)
{
	asm volatile(".byte 0x0f, 0x1f, 0x80; .long 0x6264626f" : : : "memory");
}

static inline void mark_end(void)
{
	asm volatile(".byte 0x0f, 0x1f, 0x80; .long 0x6564626f" : : : "memory");
}

/* The figures of the last command. */
static char result[2048];
static size_t result_len;
static DEFINE_MUTEX(run_lock);
static struct dentry *dir;

static int plan_read(struct plan *plan, const char *path)
{
	void *data = NULL;
	ssize_t len;
	size_t i;

	len = kernel_read_file_from_path(path, 0, &data, INT_MAX, NULL,
					 READING_UNKNOWN);
	if (len < 0)
		return len;
	plan->ranges = data;
	plan->count = len / sizeof(struct piece);
	plan->max_len = 0;
	plan->max_extra = 0;
	for (i = 0; i < plan->count; i++) {
		plan->max_len = max(plan->max_len, plan->ranges[i].len);
		plan->max_extra = max(plan->max_extra, plan->ranges[i].extra);
	}
	if (!plan->count) {
		vfree(data);
		return -EINVAL;
	}
	return 0;
}

static int compare_u32(const void *a, const void *b)
{
	u32 x = *(const u32 *)a, y = *(const u32 *)b;

	return x < y ? -1 : x > y;
}

/* Writes the result. Sorts @times, the ns of each request, or NULL. */
static void report(size_t count, u64 bytes, u64 ns, u32 *times)
{
	result_len = scnprintf(result, sizeof(result),
			       "requests %zu\nbytes %llu\nns %llu\n",
			       count, bytes, ns);
	if (!times)
		return;
	sort(times, count, sizeof(*times), compare_u32, NULL);
	result_len += scnprintf(result + result_len,
				sizeof(result) - result_len,
				"p50 %u\np99 %u\nmax %u\n", times[count / 2],
				times[count - 1 - count / 100],
				times[count - 1]);
}

/* Threads. Each does a part of the plan. */

struct job;
struct slot;

struct worker {
	struct job *job;
	struct task_struct *task;
	size_t first, end;
	u64 bytes;
	int error;
	/* bio */
	struct slot *slots;
	struct llist_head list;
	int read_error;
	/* file */
	char *buffer;
};

struct job {
	struct plan plan;
	struct worker workers[MAX_THREADS];
	unsigned int threads;
	struct completion go;
	atomic_t running;
	struct completion over;
	u32 *times;
	/* Not measured: allocates memory that @finish frees. */
	int (*prepare)(struct worker *worker);
	int (*work)(struct worker *worker);
	void (*finish)(struct worker *worker);
	/* bio */
	struct block_device *bdev;
	unsigned int depth;
	/* file */
	char **names;
	struct file **files;
	size_t bytes_at_once;
};

static int worker_run(void *data)
{
	struct worker *worker = data;
	struct job *job = worker->job;

	wait_for_completion(&job->go);
	worker->error = job->work(worker);
	if (atomic_dec_and_test(&job->running))
		complete(&job->over);
	return 0;
}

/* Runs @job's work and reports. If there is one thread, it is the caller. */
static int job_run(struct job *job)
{
	size_t count = job->plan.count;
	u64 start, ns, bytes = 0;
	unsigned int i;
	int error = 0;

	job->times = vcalloc(count, sizeof(*job->times));
	if (!job->times)
		return -ENOMEM;
	init_completion(&job->go);
	init_completion(&job->over);
	for (i = 0; i < job->threads; i++) {
		struct worker *worker = &job->workers[i];

		worker->job = job;
		worker->first = count * i / job->threads;
		worker->end = count * (i + 1) / job->threads;
		error = error ?: job->prepare(worker);
	}
	if (error)
		goto out;
	if (job->threads == 1) {
		start = ktime_get_ns();
		mark_begin();
		job->workers[0].error = job->work(&job->workers[0]);
		mark_end();
	} else {
		atomic_set(&job->running, job->threads);
		for (i = 0; i < job->threads; i++) {
			struct worker *worker = &job->workers[i];

			worker->task = kthread_run(worker_run, worker,
						   "obd_bench/%u", i);
			if (IS_ERR(worker->task)) {
				worker->error = PTR_ERR(worker->task);
				if (atomic_dec_and_test(&job->running))
					complete(&job->over);
			}
		}
		start = ktime_get_ns();
		complete_all(&job->go);
		wait_for_completion(&job->over);
	}
	ns = ktime_get_ns() - start;
	for (i = 0; i < job->threads; i++) {
		bytes += job->workers[i].bytes;
		error = error ?: job->workers[i].error;
	}
	if (!error)
		report(count, bytes, ns, job->times);
out:
	for (i = 0; i < job->threads; i++)
		job->finish(&job->workers[i]);
	vfree(job->times);
	return error;
}

/* Bios. */

struct slot {
	struct bio bio;
	struct bio_vec vecs[MAX_CHUNKS];
	struct page *chunks[MAX_CHUNKS];
	struct llist_node free;
	struct llist_head *list;
	struct task_struct *waiter;
	u64 start;
	u32 *time;
	int *error;
};

static void slot_done(struct bio *bio)
{
	struct slot *slot = container_of(bio, struct slot, bio);
	struct task_struct *waiter = slot->waiter;

	*slot->time = ktime_get_ns() - slot->start;
	if (bio->bi_status)
		WRITE_ONCE(*slot->error, -EIO);
	bio_uninit(bio);
	/* Once the slot is on the list, the waiter may free it and exit. */
	get_task_struct(waiter);
	llist_add(&slot->free, slot->list);
	wake_up_process(waiter);
	put_task_struct(waiter);
}

static void slot_submit(struct slot *slot, struct block_device *bdev,
			const struct piece *range)
{
	u32 left = range->len;
	int i;

	bio_init(&slot->bio, bdev, slot->vecs, MAX_CHUNKS, REQ_OP_READ);
	slot->bio.bi_iter.bi_sector = range->offset >> SECTOR_SHIFT;
	slot->bio.bi_end_io = slot_done;
	for (i = 0; left; i++) {
		u32 now = min_t(u32, left, CHUNK_BYTES);

		__bio_add_page(&slot->bio, slot->chunks[i], now, 0);
		left -= now;
	}
	slot->start = ktime_get_ns();
	submit_bio(&slot->bio);
}

static void slots_free(struct slot *slots, unsigned int depth)
{
	unsigned int i, chunk;

	for (i = 0; i < depth; i++)
		for (chunk = 0; chunk < MAX_CHUNKS; chunk++)
			if (slots[i].chunks[chunk])
				__free_pages(slots[i].chunks[chunk],
					     CHUNK_ORDER);
	kvfree(slots);
}

static struct slot *slots_alloc(unsigned int depth, u32 max_len,
				struct llist_head *list, int *error)
{
	u32 chunk, chunks = DIV_ROUND_UP(max_len, CHUNK_BYTES);
	struct slot *slots;
	unsigned int i;

	slots = kvcalloc(depth, sizeof(*slots), GFP_KERNEL);
	if (!slots)
		return NULL;
	for (i = 0; i < depth; i++) {
		for (chunk = 0; chunk < chunks; chunk++) {
			struct page *page = alloc_pages(GFP_KERNEL,
							CHUNK_ORDER);

			if (!page) {
				slots_free(slots, depth);
				return NULL;
			}
			slots[i].chunks[chunk] = page;
		}
		slots[i].list = list;
		slots[i].waiter = current;
		slots[i].error = error;
		llist_add(&slots[i].free, list);
	}
	return slots;
}

/* Returns the next free slot. Waits for one if necessary. */
static struct slot *slot_get(struct llist_node **nodes,
			     struct llist_head *list)
{
	struct slot *slot;

	while (!*nodes) {
		set_current_state(TASK_UNINTERRUPTIBLE);
		*nodes = llist_del_all(list);
		if (!*nodes)
			io_schedule();
		__set_current_state(TASK_RUNNING);
	}
	slot = llist_entry(*nodes, struct slot, free);
	*nodes = (*nodes)->next;
	return slot;
}

static int bio_prepare(struct worker *worker)
{
	struct job *job = worker->job;

	init_llist_head(&worker->list);
	worker->slots = slots_alloc(job->depth, job->plan.max_len,
				    &worker->list, &worker->read_error);
	return worker->slots ? 0 : -ENOMEM;
}

static int bio_work(struct worker *worker)
{
	struct job *job = worker->job;
	struct llist_node *nodes = NULL;
	struct slot *slot;
	unsigned int back;
	size_t i;

	for (i = worker->first; i < worker->end; i++) {
		slot = slot_get(&nodes, &worker->list);
		slot->waiter = current;
		slot->time = &job->times[i];
		slot_submit(slot, job->bdev, &job->plan.ranges[i]);
		worker->bytes += job->plan.ranges[i].len;
	}
	for (back = 0; back < job->depth; back++)
		slot_get(&nodes, &worker->list);
	return worker->read_error;
}

static void bio_finish(struct worker *worker)
{
	if (worker->slots)
		slots_free(worker->slots, worker->job->depth);
}

static int run_bio(struct job *job, const char *dev, const char *plan,
		   const char *depth, const char *threads)
{
	struct file *file;
	int error;

	if (kstrtouint(depth, 10, &job->depth) ||
	    kstrtouint(threads, 10, &job->threads) || !job->depth ||
	    job->depth > MAX_DEPTH || !job->threads ||
	    job->threads > MAX_THREADS)
		return -EINVAL;
	error = plan_read(&job->plan, plan);
	if (error)
		return error;
	error = -EINVAL;
	if (job->plan.max_len > MAX_BYTES)
		goto out_plan;
	file = bdev_file_open_by_path(dev, BLK_OPEN_READ, NULL, NULL);
	error = PTR_ERR_OR_ZERO(file);
	if (error)
		goto out_plan;
	job->bdev = file_bdev(file);
	job->prepare = bio_prepare;
	job->work = bio_work;
	job->finish = bio_finish;
	error = job_run(job);
	bdev_fput(file);
out_plan:
	vfree(job->plan.ranges);
	return error;
}

/* A thread reads small ranges, while another one reads much. */

struct beside {
	struct plan plan, scan;
	struct block_device *bdev, *other;
	unsigned int ms, pause, depth;
	u32 *times, *late;
	size_t count;
	u64 bytes, ns;
	/* Bytes that the other thread has read; those while the reader ran. */
	u64 scanned, scanned_beside;
	struct completion started, scan_over, over;
	bool stop;
	int error, scan_error;
};

/* Reschedules like a process that returns from a system call. */
static void as_at_user_mode(void)
{
	if (need_resched() || test_thread_flag(TIF_NEED_RESCHED_LAZY))
		schedule();
}

static int scan_run(void *data)
{
	struct beside *beside = data;
	struct llist_node *nodes = NULL;
	struct slot *slots, *slot;
	unsigned int depth = beside->depth, back;
	LLIST_HEAD(list);
	size_t i, at = 0;
	u32 time;

	slots = slots_alloc(depth, beside->scan.max_len, &list,
			    &beside->scan_error);
	if (!slots) {
		beside->scan_error = -ENOMEM;
		complete(&beside->started);
		goto out;
	}
	for (i = 0; !READ_ONCE(beside->stop); i++) {
		slot = slot_get(&nodes, &list);
		/* All ranges have the same length, so any may count. */
		if (i >= depth)
			WRITE_ONCE(beside->scanned, beside->scanned +
				   beside->scan.ranges[at].len);
		if (i == depth)
			complete(&beside->started);
		slot->time = &time;
		slot_submit(slot, beside->other, &beside->scan.ranges[at]);
		at = (at + 1) % beside->scan.count;
		as_at_user_mode();
	}
	/* Slots that were never submitted are on the list, too. */
	for (back = 0; back < depth; back++)
		slot_get(&nodes, &list);
	slots_free(slots, depth);
out:
	complete(&beside->scan_over);
	return 0;
}

static void sleep_until(u64 due)
{
	ktime_t expires = ns_to_ktime(due);

	set_current_state(TASK_UNINTERRUPTIBLE);
	schedule_hrtimeout_range(&expires, 0, HRTIMER_MODE_ABS);
}

static int reader_run(void *data)
{
	struct beside *beside = data;
	struct llist_node *nodes = NULL;
	struct slot *slots, *slot;
	u64 start, end, now, due, before;
	LLIST_HEAD(list);
	size_t i, at = 0;
	u32 time;

	slots = slots_alloc(1, beside->plan.max_len, &list, &beside->error);
	if (!slots) {
		beside->error = -ENOMEM;
		goto out;
	}
	slot = slot_get(&nodes, &list);
	slot->time = &time;
	before = READ_ONCE(beside->scanned);
	start = ktime_get_ns();
	end = start + beside->ms * NSEC_PER_MSEC;
	for (i = 0, now = start; i < MAX_TIMES && now < end; i++) {
		if (beside->pause) {
			due = now + beside->pause / 2 +
			      get_random_u32_below(beside->pause);
			sleep_until(due);
			now = ktime_get_ns();
			beside->late[i] = now - min(due, now);
		}
		due = now;
		slot_submit(slot, beside->bdev, &beside->plan.ranges[at]);
		slot_get(&nodes, &list);
		as_at_user_mode();
		now = ktime_get_ns();
		beside->times[i] = now - due;
		beside->bytes += beside->plan.ranges[at].len;
		at = (at + 1) % beside->plan.count;
	}
	beside->scanned_beside = READ_ONCE(beside->scanned) - before;
	beside->count = i;
	beside->ns = now - start;
	slots_free(slots, 1);
out:
	complete(&beside->over);
	return 0;
}

static int beside_start(int (*work)(void *), struct beside *beside,
			const char *name)
{
	struct task_struct *task = kthread_create(work, beside, "%s", name);

	if (IS_ERR(task))
		return PTR_ERR(task);
	kthread_bind(task, cpumask_first(cpu_online_mask));
	wake_up_process(task);
	return 0;
}

static int beside_measure(struct beside *beside)
{
	int error;

	init_completion(&beside->started);
	init_completion(&beside->scan_over);
	init_completion(&beside->over);
	if (beside->depth) {
		error = beside_start(scan_run, beside, "obd_bench/scan");
		if (error)
			return error;
		wait_for_completion(&beside->started);
	}
	error = beside_start(reader_run, beside, "obd_bench/read");
	if (!error)
		wait_for_completion(&beside->over);
	if (beside->depth) {
		WRITE_ONCE(beside->stop, true);
		wait_for_completion(&beside->scan_over);
	}
	error = error ?: beside->error ?: beside->scan_error;
	if (error)
		return error;
	report(beside->count, beside->bytes, beside->ns, beside->times);
	sort(beside->late, beside->count, sizeof(u32), compare_u32, NULL);
	result_len += scnprintf(result + result_len,
				sizeof(result) - result_len,
				"late50 %u\nlate99 %u\nscanned %llu\n",
				beside->late[beside->count / 2],
				beside->late[beside->count - 1 -
					     beside->count / 100],
				beside->scanned_beside);
	return 0;
}

static int run_beside(char **words)
{
	struct file *file, *other;
	struct beside *beside;
	int error = -EINVAL;

	beside = kzalloc_obj(*beside);
	if (!beside)
		return -ENOMEM;
	if (kstrtouint(words[3], 10, &beside->ms) ||
	    kstrtouint(words[4], 10, &beside->pause) ||
	    kstrtouint(words[7], 10, &beside->depth) || !beside->ms ||
	    beside->ms > 60 * MSEC_PER_SEC || beside->pause > USEC_PER_SEC ||
	    beside->depth > MAX_DEPTH)
		goto out;
	beside->pause *= NSEC_PER_USEC;
	error = plan_read(&beside->plan, words[2]);
	if (error)
		goto out;
	error = plan_read(&beside->scan, words[6]);
	if (error)
		goto out_plan;
	error = -EINVAL;
	if (beside->plan.max_len > MAX_BYTES ||
	    beside->scan.max_len > MAX_BYTES)
		goto out_scan;
	file = bdev_file_open_by_path(words[1], BLK_OPEN_READ, NULL, NULL);
	error = PTR_ERR_OR_ZERO(file);
	if (error)
		goto out_scan;
	other = bdev_file_open_by_path(words[5], BLK_OPEN_READ, NULL, NULL);
	error = PTR_ERR_OR_ZERO(other);
	if (error)
		goto out_file;
	beside->bdev = file_bdev(file);
	beside->other = file_bdev(other);
	error = -ENOMEM;
	beside->times = vcalloc(MAX_TIMES, sizeof(u32));
	beside->late = vcalloc(MAX_TIMES, sizeof(u32));
	if (beside->times && beside->late)
		error = beside_measure(beside);
	vfree(beside->late);
	vfree(beside->times);
	bdev_fput(other);
out_file:
	bdev_fput(file);
out_scan:
	vfree(beside->scan.ranges);
out_plan:
	vfree(beside->plan.ranges);
out:
	kfree(beside);
	return error;
}

/* Codecs. */

struct codec {
	char *blob;
	zstd_dctx *zstd;
	char *src, *dst;
	size_t src_size;
	bool crc;
	u32 sink;
};

static int decompress(struct codec *codec, const struct piece *piece,
		      const char *src)
{
	u32 stored = piece->len;

	if (codec->crc) {
		/* The CRC follows the block. */
		stored -= sizeof(u32);
		codec->sink += crc32c(~0, src, stored);
	}
	if (codec->zstd)
		return zstd_decompress_dctx(codec->zstd, codec->dst,
					    piece->extra, src,
					    stored) == piece->extra ? 0 : -EIO;
	return LZ4_decompress_safe(src, codec->dst, stored,
				   piece->extra) == piece->extra ? 0 : -EIO;
}

/*
 * Measures decompression. Some blocks at a time are copied first, which isn't
 * measured, so that they are in the CPU's caches as after a read.
 */
static int codec_work(struct codec *codec, const struct plan *plan)
{
	const char *from = codec->blob;
	u64 start, ns = 0, bytes = 0;
	size_t i, done, used;
	int error;

	for (i = 0; i < plan->count;) {
		for (done = i, used = 0; i < plan->count; i++) {
			if (used + plan->ranges[i].len > codec->src_size)
				break;
			used += plan->ranges[i].len;
		}
		memcpy(codec->src, from, used);
		from += used;
		start = ktime_get_ns();
		mark_begin();
		for (used = 0; done < i; done++) {
			error = decompress(codec, &plan->ranges[done],
					   codec->src + used);
			if (error)
				return error;
			used += plan->ranges[done].len;
			bytes += plan->ranges[done].extra;
		}
		mark_end();
		ns += ktime_get_ns() - start;
		cond_resched();
	}
	report(plan->count, bytes, ns, NULL);
	return 0;
}

/* Returns the content of a plan's pieces, concatenated. */
static char *blob_read(const char *dev, const struct plan *plan)
{
	struct file *file = filp_open(dev, O_RDONLY | O_LARGEFILE, 0);
	size_t i, size = 0, used = 0;
	char *blob;

	if (IS_ERR(file))
		return ERR_CAST(file);
	for (i = 0; i < plan->count; i++)
		size += plan->ranges[i].len;
	blob = vmalloc(size);
	for (i = 0; blob && i < plan->count; i++) {
		loff_t pos = plan->ranges[i].offset;
		u32 len = plan->ranges[i].len;

		if (len < sizeof(u32) ||
		    kernel_read(file, blob + used, len, &pos) != len) {
			vfree(blob);
			blob = NULL;
		}
		used += len;
	}
	filp_close(file, NULL);
	return blob ?: ERR_PTR(-EIO);
}

static int run_codec(const char *dev, const char *path, const char *algorithm,
		     const char *crc)
{
	struct codec codec = { .crc = crc[0] == '1' };
	size_t workspace_size = zstd_dctx_workspace_bound();
	void *workspace = NULL;
	struct plan plan;
	int error;

	error = plan_read(&plan, path);
	if (error)
		return error;
	codec.blob = blob_read(dev, &plan);
	error = PTR_ERR_OR_ZERO(codec.blob);
	if (error)
		goto out_plan;
	error = -ENOMEM;
	codec.src_size = max_t(size_t, plan.max_len, 128 << 10);
	codec.src = kvmalloc(codec.src_size, GFP_KERNEL);
	codec.dst = kvmalloc(plan.max_extra, GFP_KERNEL);
	if (!codec.src || !codec.dst)
		goto out_buffers;
	if (!strcmp(algorithm, "zstd")) {
		workspace = vmalloc(workspace_size);
		codec.zstd = workspace ? zstd_init_dctx(workspace,
							workspace_size) : NULL;
		if (!codec.zstd)
			goto out_buffers;
	}
	error = codec_work(&codec, &plan);
out_buffers:
	vfree(workspace);
	kvfree(codec.dst);
	kvfree(codec.src);
	vfree(codec.blob);
out_plan:
	vfree(plan.ranges);
	return error;
}

/* Files. */

static int file_prepare(struct worker *worker)
{
	worker->buffer = kvmalloc(worker->job->bytes_at_once, GFP_KERNEL);
	return worker->buffer ? 0 : -ENOMEM;
}

static int file_work(struct worker *worker)
{
	struct job *job = worker->job;
	struct file *file;
	ssize_t got = 0;
	u64 start;
	size_t i;

	for (i = worker->first; i < worker->end; i++) {
		const struct piece *range = &job->plan.ranges[i];
		loff_t pos = range->offset, end = pos + range->len;

		start = ktime_get_ns();
		if (job->files) {
			file = job->files[range->extra];
		} else {
			file = filp_open(job->names[range->extra],
					 O_RDONLY | O_LARGEFILE, 0);
			if (IS_ERR(file)) {
				got = PTR_ERR(file);
				break;
			}
		}
		while (pos < end) {
			got = kernel_read(file, worker->buffer,
					  min_t(loff_t, end - pos,
						job->bytes_at_once), &pos);
			if (got <= 0)
				break;
			worker->bytes += got;
			cond_resched();
		}
		if (!job->files)
			filp_close(file, NULL);
		job->times[i] = ktime_get_ns() - start;
		if (pos < end) {
			got = got ?: -EIO;
			break;
		}
	}
	return got < 0 ? got : 0;
}

static void file_finish(struct worker *worker)
{
	kvfree(worker->buffer);
}

static int run_file(struct job *job, const char *list, const char *plan,
		    const char *bytes, const char *threads, const char *keep)
{
	size_t names = 0, i;
	char *next, *name;
	void *data = NULL;
	unsigned long at_once;
	ssize_t len;
	int error;

	if (kstrtoul(bytes, 10, &at_once) ||
	    kstrtouint(threads, 10, &job->threads) || !at_once ||
	    at_once > MAX_BYTES || !job->threads ||
	    job->threads > MAX_THREADS)
		return -EINVAL;
	job->bytes_at_once = at_once;
	job->prepare = file_prepare;
	job->work = file_work;
	job->finish = file_finish;
	error = plan_read(&job->plan, plan);
	if (error)
		return error;
	len = kernel_read_file_from_path(list, 0, &data, INT_MAX, NULL,
					 READING_UNKNOWN);
	error = len;
	if (len < 0)
		goto out_plan;
	/* Each line ends with a newline. */
	error = -EINVAL;
	if (!len || ((char *)data)[len - 1] != '\n')
		goto out_list;
	((char *)data)[len - 1] = '\0';
	if (job->plan.max_extra > MAX_FILES)
		goto out_list;
	error = -ENOMEM;
	job->names = vcalloc(job->plan.max_extra + 1, sizeof(char *));
	if (!job->names)
		goto out_list;
	for (next = data; (name = strsep(&next, "\n"));)
		if (names <= job->plan.max_extra)
			job->names[names++] = name;
	error = -EINVAL;
	if (names <= job->plan.max_extra)
		goto out_names;
	if (keep[0] == '1') {
		error = -ENOMEM;
		job->files = vcalloc(names, sizeof(struct file *));
		if (!job->files)
			goto out_names;
		for (i = 0; i < names; i++) {
			struct file *file = filp_open(job->names[i], O_RDONLY |
						      O_LARGEFILE, 0);

			error = PTR_ERR_OR_ZERO(file);
			if (error)
				goto out_files;
			job->files[i] = file;
		}
	}
	error = job_run(job);
out_files:
	for (i = 0; job->files && i < names; i++)
		if (job->files[i])
			filp_close(job->files[i], NULL);
	vfree(job->files);
out_names:
	vfree(job->names);
out_list:
	vfree(data);
out_plan:
	vfree(job->plan.ranges);
	return error;
}

/* Interrupts between CPUs. */

/* Only what takes longer counts as late, since a busy host may stop a CPU. */
#define STORM_LATE_NS (2 * NSEC_PER_SEC)
#define STORM_TIMER_NS (300 * NSEC_PER_USEC)
/*
 * How long a CPU that has turned interrupts off waits for the other CPU, and
 * then for the interrupts from it.
 */
#define STORM_MEET_NS NSEC_PER_MSEC
#define STORM_SEND_NS (50 * NSEC_PER_USEC)

struct storm_side {
	struct storm_side *other;
	struct task_struct *task;
	int cpu;
	u64 end;
	void (*step)(struct storm_side *side);
	struct completion over, ping;
	call_single_data_t csd;
	struct tasklet_struct tasklet;
	struct hrtimer timer;
	u64 timer_last, timer_max;
	/* Calls sent to the other CPU, and those that have run there. */
	u32 sent, ran;
	bool timed, in_tasklet, leave_tasklet, held;
	u64 count, max, late, stuck, timers;
};

#define STORM_SIDES 2

/* Counts what began at @start. Returns whether that took too long. */
static bool storm_measure(struct storm_side *side, u64 start)
{
	u64 ns = ktime_get_ns() - start;

	side->count++;
	side->max = max(side->max, ns);
	return ns > STORM_LATE_NS;
}

static void storm_took(struct storm_side *side, u64 start)
{
	if (storm_measure(side, start))
		side->late++;
}

/* Interrupts from the other CPU come both while they are on and while off. */
static void storm_turn_off_and_on(void)
{
	unsigned int times = get_random_u32_below(64), spin;
	unsigned long flags;

	while (times--) {
		local_irq_save(flags);
		for (spin = get_random_u32_below(64); spin; spin--)
			cpu_relax();
		local_irq_restore(flags);
	}
}

static void storm_ran(void *data)
{
	struct storm_side *from = data;

	WRITE_ONCE(from->ran, from->ran + 1);
}

/* Polls until a condition is true, or STORM_LATE_NS have passed; measures it. */
#define storm_until(side, condition) ({				\
	u64 since = ktime_get_ns();				\
								\
	while (!(condition) &&					\
	       ktime_get_ns() - since <= STORM_LATE_NS)		\
		cpu_relax();					\
	storm_took(side, since);				\
})

/* Sends a call to the other CPU, and waits until it has run. */
static void storm_call(struct storm_side *side)
{
	u64 start = ktime_get_ns();

	smp_call_function_single(side->other->cpu, storm_ran, side, 1);
	storm_took(side, start);
	if (READ_ONCE(side->ran) != ++side->sent)
		side->late++;
	storm_turn_off_and_on();
}

/* Sends a call with interrupts off, and waits until it has run. */
static void storm_send(struct storm_side *side)
{
	unsigned long flags;
	int error;

	INIT_CSD(&side->csd, storm_ran, side);
	local_irq_save(flags);
	error = smp_call_function_single_async(side->other->cpu, &side->csd);
	local_irq_restore(flags);
	side->sent++;
	storm_until(side, READ_ONCE(side->ran) == side->sent);
	if (error || READ_ONCE(side->ran) != side->sent) {
		/* End: the csd may still be on the other CPU's list. */
		side->late++;
		side->end = 0;
	}
	storm_turn_off_and_on();
}

/* Wakes up the other CPU's thread, and sleeps: this CPU becomes idle. */
static void storm_ping(struct storm_side *side)
{
	u64 start = ktime_get_ns();

	complete(&side->other->ping);
	wait_for_completion_timeout(&side->ping,
				    nsecs_to_jiffies(2 * STORM_LATE_NS));
	storm_took(side, start);
}

static void storm_tasklet(struct tasklet_struct *tasklet)
{
	struct storm_side *side = from_tasklet(side, tasklet, tasklet);
	u64 start = ktime_get_ns();

	WRITE_ONCE(side->in_tasklet, true);
	while (!READ_ONCE(side->leave_tasklet)) {
		if (ktime_get_ns() - start > STORM_LATE_NS) {
			side->stuck++;
			break;
		}
		cpu_relax();
	}
	WRITE_ONCE(side->in_tasklet, false);
}

static void storm_enter(void *data)
{
	struct storm_side *side = data;

	WRITE_ONCE(side->leave_tasklet, false);
	tasklet_schedule(&side->tasklet);
}

static void storm_leave(void *data)
{
	struct storm_side *side = data;

	WRITE_ONCE(side->leave_tasklet, true);
}

/* Ends the other CPU's tasklet with a call. */
static void storm_end_tasklet(struct storm_side *side)
{
	struct storm_side *other = side->other;
	u64 start = ktime_get_ns(), stuck = READ_ONCE(other->stuck);

	smp_call_function_single(other->cpu, storm_leave, other, 1);
	/* A tasklet that gave up waiting for this call counts that in @stuck. */
	if (storm_measure(side, start) && READ_ONCE(other->stuck) == stuck)
		side->late++;
}

/* Has the other CPU run a softirq until a call from this CPU interrupts it. */
static void storm_softirq(struct storm_side *side)
{
	struct storm_side *other = side->other;

	smp_call_function_single(other->cpu, storm_enter, other, 0);
	storm_until(side, READ_ONCE(other->in_tasklet));
	storm_end_tasklet(side);
	storm_until(side, !READ_ONCE(other->in_tasklet));
}

/*
 * Sends two interrupts to the other CPU, which runs storm_hold() and has
 * interrupts off. A softirq after the first one waits for the second one, and so
 * does this CPU.
 */
static void storm_pair(struct storm_side *side)
{
	struct storm_side *other = side->other;
	u64 start = ktime_get_ns();

	while (!READ_ONCE(other->held)) {
		/* The other CPU counts what is late there. */
		if (ktime_get_ns() - start > STORM_MEET_NS)
			return;
		cpu_relax();
	}
	kick_process(other->task);
	/* From now on, the tasklet waits for the call of storm_end_tasklet(). */
	WRITE_ONCE(other->held, false);
	storm_end_tasklet(side);
}

/*
 * Turns interrupts off until storm_pair() on the other CPU may have sent two, and
 * counts how often it may have.
 */
static void storm_hold(struct storm_side *side)
{
	unsigned long flags;
	u64 start;

	local_irq_save(flags);
	/* With interrupts off: until then, an earlier call may set it. */
	WRITE_ONCE(side->leave_tasklet, false);
	/* Stays true until the tasklet ends. */
	WRITE_ONCE(side->in_tasklet, true);
	tasklet_schedule(&side->tasklet);
	WRITE_ONCE(side->held, true);
	start = ktime_get_ns();
	while (READ_ONCE(side->held) && ktime_get_ns() - start <= STORM_MEET_NS)
		cpu_relax();
	if (READ_ONCE(side->held)) {
		/* The tasklet need not wait: the other CPU came too late. */
		WRITE_ONCE(side->held, false);
		WRITE_ONCE(side->leave_tasklet, true);
	} else {
		side->count++;
		start = ktime_get_ns();
		while (ktime_get_ns() - start <= STORM_SEND_NS)
			cpu_relax();
	}
	local_irq_restore(flags);
	/* A stuck tasklet gives up after half of this, and counts @stuck. */
	start = ktime_get_ns();
	while (READ_ONCE(side->in_tasklet)) {
		if (ktime_get_ns() - start > 2 * STORM_LATE_NS) {
			side->late++;
			break;
		}
		cpu_relax();
	}
}

static void storm_receive(struct storm_side *side)
{
	storm_turn_off_and_on();
	side->count++;
}

static enum hrtimer_restart storm_tick(struct hrtimer *timer)
{
	struct storm_side *side = container_of(timer, struct storm_side, timer);
	u64 now = ktime_get_ns(), ns = now - side->timer_last;

	side->timers++;
	side->timer_last = now;
	side->timer_max = max(side->timer_max, ns);
	if (ns > STORM_LATE_NS)
		side->late++;
	hrtimer_forward_now(timer, ns_to_ktime(STORM_TIMER_NS));
	return HRTIMER_RESTART;
}

static int storm_run(void *data)
{
	struct storm_side *side = data;

	side->timer_last = ktime_get_ns();
	if (side->timed)
		hrtimer_start(&side->timer, ns_to_ktime(STORM_TIMER_NS),
			      HRTIMER_MODE_REL_PINNED_HARD);
	while (ktime_get_ns() < side->end) {
		side->step(side);
		cond_resched();
	}
	complete(&side->other->ping);
	hrtimer_cancel(&side->timer);
	/* A timer that never came again was not seen by storm_tick(). */
	if (side->timed && ktime_get_ns() - side->timer_last > STORM_LATE_NS)
		side->late++;
	complete(&side->over);
	return 0;
}

/* Waits until @side ends. Returns false if that takes over @ms and 60 s. */
static bool storm_ends(struct storm_side *side, u32 ms)
{
	unsigned long end = jiffies + msecs_to_jiffies(ms + 60000);

	/* In steps: a task that sleeps for some minutes counts as hung. */
	while (!wait_for_completion_timeout(&side->over, 10 * HZ))
		if (time_after(jiffies, end))
			return false;
	return true;
}

/*
 * Runs one phase: one CPU repeats @first, the other one @second. Appends the
 * figures to the result. With @timed, timers interrupt both CPUs.
 */
static int storm_phase(const char *name, u32 ms, bool timed,
		       void (*first)(struct storm_side *),
		       void (*second)(struct storm_side *))
{
	u64 late = 0, end;
	int cpu, i = 0, len = result_len;
	struct storm_side *sides;
	struct task_struct *task;

	/* New memory, as that of a phase that failed may still be in use. */
	sides = kzalloc_objs(*sides, STORM_SIDES);
	if (!sides)
		return -ENOMEM;
	end = ktime_get_ns() + ms * NSEC_PER_MSEC;
	for_each_online_cpu(cpu) {
		struct storm_side *side = &sides[i];

		side->cpu = cpu;
		side->other = &sides[1 - i];
		/*
		 * One end for both: a side that goes on alone would wait for
		 * wake-ups that nobody sends.
		 */
		side->end = end;
		side->timed = timed;
		side->step = i ? second : first;
		init_completion(&side->over);
		init_completion(&side->ping);
		tasklet_setup(&side->tasklet, storm_tasklet);
		hrtimer_setup(&side->timer, storm_tick, CLOCK_MONOTONIC,
			      HRTIMER_MODE_REL_PINNED_HARD);
		if (++i == STORM_SIDES)
			break;
	}
	for (i = 0; i < STORM_SIDES; i++) {
		task = kthread_create(storm_run, &sides[i],
				      "obd_bench/storm%d", i);
		if (IS_ERR(task)) {
			/* The first one has not started. */
			if (i) {
				kthread_stop(sides[0].task);
				put_task_struct(sides[0].task);
			}
			kfree(sides);
			return PTR_ERR(task);
		}
		kthread_bind(task, sides[i].cpu);
		/* The other side may kick this task after the task has ended. */
		sides[i].task = get_task_struct(task);
	}
	for (i = 0; i < STORM_SIDES; i++)
		wake_up_process(sides[i].task);
	for (i = 0; i < STORM_SIDES; i++) {
		struct storm_side *side = &sides[i];

		if (!storm_ends(side, ms)) {
			pr_err("obd_bench: CPU %d hangs in %s\n", side->cpu,
			       name);
			/* The thread may still use the memory and this code. */
			__module_get(THIS_MODULE);
			return -ETIMEDOUT;
		}
		late += side->late + side->stuck;
	}
	for (i = 0; i < STORM_SIDES; i++) {
		struct storm_side *side = &sides[i];

		put_task_struct(side->task);
		len += scnprintf(result + len, sizeof(result) - len,
				 "%s%d_count %llu\n%s%d_max %llu\n%s%d_timers %llu\n%s%d_timer_max %llu\n",
				 name, i, side->count, name, i, side->max, name,
				 i, side->timers, name, i, side->timer_max);
	}
	len += scnprintf(result + len, sizeof(result) - len, "%s_late %llu\n",
			 name, late);
	result_len = len;
	if (late) {
		/*
		 * A call or a tasklet that has not come yet may do so later,
		 * and use the memory and this code.
		 */
		__module_get(THIS_MODULE);
		return 0;
	}
	for (i = 0; i < STORM_SIDES; i++)
		tasklet_kill(&sides[i].tasklet);
	kfree(sides);
	return 0;
}

static int run_storm(const char *time)
{
	int error;
	u32 ms;

	if (kstrtou32(time, 10, &ms) || !ms || ms > 3600 * MSEC_PER_SEC ||
	    num_online_cpus() < STORM_SIDES)
		return -EINVAL;
	error = storm_phase("call", ms, true, storm_call, storm_call);
	error = error ?: storm_phase("send", ms, true, storm_send, storm_send);
	error = error ?: storm_phase("ping", ms, true, storm_ping, storm_ping);
	/* Without the timers: they would end a sleep that misses a wake-up. */
	error = error ?: storm_phase("sleep", ms, false, storm_ping,
				     storm_ping);
	error = error ?: storm_phase("softirq", ms, true, storm_softirq,
				     storm_receive);
	return error ?: storm_phase("pair", ms, true, storm_pair, storm_hold);
}

/* The interface. */

static int run(char *line)
{
	char *words[8] = {};
	struct job *job;
	int count = 0;
	char *word;
	int error;

	while ((word = strsep(&line, blanks)))
		if (*word && count < ARRAY_SIZE(words))
			words[count++] = word;
	if (!count)
		return -EINVAL;
	job = kzalloc_obj(*job);
	if (!job)
		return -ENOMEM;
	error = -EINVAL;
	if (!strcmp(words[0], "bio") && count == 5)
		error = run_bio(job, words[1], words[2], words[3], words[4]);
	else if (!strcmp(words[0], "codec") && count == 5)
		error = run_codec(words[1], words[2], words[3], words[4]);
	else if (!strcmp(words[0], "file") && count == 6)
		error = run_file(job, words[1], words[2], words[3], words[4],
				 words[5]);
	else if (!strcmp(words[0], "beside") && count == 8)
		error = run_beside(words);
	else if (!strcmp(words[0], "storm") && count == 2)
		error = run_storm(words[1]);
	kfree(job);
	return error;
}

static ssize_t run_write(struct file *file, const char __user *data,
			 size_t len, loff_t *pos)
{
	char *line = memdup_user_nul(data, min_t(size_t, len, PAGE_SIZE - 1));
	int error;

	if (IS_ERR(line))
		return PTR_ERR(line);
	mutex_lock(&run_lock);
	result_len = 0;
	/*
	 * Unmap now what vfree() has postponed. Otherwise a worker would do so
	 * during the measurement, with a system call for each page on
	 * User-Mode Linux.
	 */
	vm_unmap_aliases();
	error = run(line);
	mutex_unlock(&run_lock);
	kfree(line);
	return error ?: len;
}

static ssize_t run_read(struct file *file, char __user *data, size_t len,
			loff_t *pos)
{
	ssize_t ret;

	mutex_lock(&run_lock);
	ret = simple_read_from_buffer(data, len, pos, result, result_len);
	mutex_unlock(&run_lock);
	return ret;
}

static const struct file_operations run_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = run_read,
	.write = run_write,
	.llseek = default_llseek,
};

static int __init obd_bench_init(void)
{
	dir = debugfs_create_dir("obd_bench", NULL);
	debugfs_create_file("run", 0600, dir, NULL, &run_fops);
	return 0;
}

static void __exit obd_bench_exit(void)
{
	debugfs_remove(dir);
}

module_init(obd_bench_init);
module_exit(obd_bench_exit);

MODULE_DESCRIPTION("Load for benchmarks of block devices and file systems");
MODULE_LICENSE("GPL");
