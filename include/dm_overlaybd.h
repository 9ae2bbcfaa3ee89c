/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shims for what Rust cannot call: inline functions and macros of the kernel.
 * Each does what the function or macro of its name without "obd_" does. Those
 * that have no such namesake say what they do.
 */
#ifndef _DM_OVERLAYBD_H
#define _DM_OVERLAYBD_H

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/percpu.h>
#include <linux/ratelimit.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

/* Block devices. */
sector_t obd_bdev_nr_sectors(struct block_device *bdev);
unsigned int obd_bdev_logical_block_size(struct block_device *bdev);
/* Whether its driver gets bios, as device-mapper does, and not requests. */
bool obd_bdev_may_stack(struct block_device *bdev);

/* Bios and pages. */
/* As memcpy and memset, also for memory that others read and change meanwhile. */
void obd_memcpy(void *to, const void *from, size_t len);
void obd_memset(void *to, int byte, size_t len);
void *obd_page_address(struct page *page);
/*
 * Counts @pages pages from @page on, or so many less, as reclaimable: they are a
 * part of KReclaimable and MemAvailable in /proc/meminfo. The latter ones are
 * about to be freed: reclaim, where this is a part of it, is told of them.
 */
void obd_count_reclaimable(struct page *page, long pages);
void obd_bio_set_dev(struct bio *bio, struct block_device *bdev);
void *obd_bvec_virt(struct bio_vec *bvec);
struct bio_vec obd_mp_bvec_iter_bvec(struct bio_vec *vec,
				     struct bvec_iter *iter);
void obd_bio_advance_iter(struct bio *bio, struct bvec_iter *iter,
			  unsigned int bytes);
void obd_flush_dcache_bio(struct bio *bio);
void obd_invalidate_kernel_vmap_range(void *addr, int size);
/* Has the I/O charged to the root control group. */
void obd_bio_associate_root(struct bio *bio);

/* Execution context. */
/* Whether interrupts are off, or this is one. */
bool obd_in_interrupt_off(void);
/*
 * Whether so many bytes are better decompressed here than by a worker, for a
 * read of this I/O priority: see the parameter at_once_bytes.
 */
bool obd_at_once(unsigned int bytes, u16 ioprio);
/*
 * bio_endio(), with bio_in_atomic() true in any context: what is above must not
 * do in the callback what may wait.
 */
void obd_bio_endio_atomic(struct bio *bio);
bool obd_fatal_signal_pending(void);
void obd_cond_resched(void);
void obd_cond_resched_tasks_rcu_qs(void);
void obd_synchronize_rcu_tasks(void);

/* Locks and work. */
#ifndef OBD_SPINLOCK_IRQ
void obd_spin_lock_irq_disable(spinlock_t *lock);
bool obd_spin_trylock_irq_disable(spinlock_t *lock);
void obd_spin_unlock_irq_enable(spinlock_t *lock);
#endif
bool obd_cpu_online(u32 cpu);
/*
 * Which CPU gets work from CPU @here: @here, or the next one of @idle that is
 * online and not isolated; nr_cpu_ids or more if there is none. Called with
 * interrupts off. @scratch is overwritten.
 */
u32 obd_cpu_for_work(const struct cpumask *idle, struct cpumask *scratch,
		     u32 here);
void obd_init_work(struct work_struct *work, work_func_t func);
bool obd_schedule_work(struct work_struct *work);
/* The timer may be late where the CPU is idle. */
void obd_init_delayed_work(struct delayed_work *work, work_func_t func);
bool obd_schedule_delayed_work(struct delayed_work *work, unsigned int seconds);
struct workqueue_struct *obd_alloc_workqueue(const char *name,
					     unsigned int flags);

/* Counters for each CPU; a sum may miss what is added meanwhile. */
u64 __percpu *obd_counter_alloc(void);
void obd_counter_add(u64 __percpu *counter, u64 n);
u64 obd_counter_sum(u64 __percpu *counter);

/*
 * The memory of the cache, in bytes: what it has (parameter cache_bytes) and may
 * have (cache_limit_bytes).
 */
void obd_cache_init(void);
u64 obd_cache_limit(void);
u64 obd_cache_bytes(void);
void obd_cache_add(s64 bytes);

/* Messages and events. */
void obd_ratelimit_default_init(struct ratelimit_state *rs);
/* Sends DM_ZFILE_CORRUPT_BLOCK=@block. May sleep. */
void obd_corrupt_uevent(struct gendisk *disk, u64 block);

#endif /* _DM_OVERLAYBD_H */
