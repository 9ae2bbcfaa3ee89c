/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shims for inline functions and macros of the kernel, which Rust cannot call.
 * A shim without a comment does the same as the function or macro with its name
 * without "obd_".
 */
#ifndef _DM_OVERLAYBD_H
#define _DM_OVERLAYBD_H

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/dax.h>
#include <linux/percpu.h>
#include <linux/ratelimit.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

/* Block devices. */
sector_t obd_bdev_nr_sectors(struct block_device *bdev);
unsigned int obd_bdev_logical_block_size(struct block_device *bdev);
/*
 * Returns whether the device's driver gets bios, as device-mapper does, and not
 * requests.
 */
bool obd_bdev_may_stack(struct block_device *bdev);
sector_t obd_get_start_sect(struct block_device *bdev);
sector_t obd_get_capacity(struct gendisk *disk);
unsigned int obd_disk_openers(struct gendisk *disk);
/* Keeps the memory of @disk, also when the disk is gone. */
void obd_get_disk(struct gendisk *disk);
/* May sleep. */
void obd_put_disk(struct gendisk *disk);

/* DAX. */
/* With DAX_ACCESS; -EOPNOTSUPP in a kernel without DAX. */
long obd_dax_direct_access(struct dax_device *dax_dev, pgoff_t pgoff,
			   long nr_pages, void **kaddr, unsigned long *pfn);
void *obd_dax_holder(struct dax_device *dax_dev);

/* This module. */
/* Must be called by code that runs with a reference to the module. */
void obd_module_get(void);
void obd_module_put(void);

/* Bios and pages. */
/* memcpy() and memset(), also for memory that user space changes meanwhile. */
void obd_memcpy(void *to, const void *from, size_t len);
void obd_memset(void *to, int byte, size_t len);
void *obd_page_address(struct page *page);
/*
 * Adds @pages, the number of pages from @page on, to the reclaimable memory:
 * KReclaimable and MemAvailable in /proc/meminfo. If @pages is negative, the
 * pages are about to be freed: subtracts them, and reports them to reclaim if
 * this is called in reclaim.
 */
void obd_count_reclaimable(struct page *page, long pages);
void obd_bio_set_dev(struct bio *bio, struct block_device *bdev);
void *obd_bvec_virt(struct bio_vec *bvec);
struct bio_vec obd_mp_bvec_iter_bvec(struct bio_vec *vec,
				     struct bvec_iter *iter);
void obd_bio_advance_iter(struct bio *bio, struct bvec_iter *iter,
			  unsigned int bytes);
/* flush_dcache_page() for all pages of @bio, if the architecture needs it. */
void obd_flush_dcache_bio(struct bio *bio);
void obd_invalidate_kernel_vmap_range(void *addr, int size);
/* Charges the I/O of @bio to the root control group. */
void obd_bio_associate_root(struct bio *bio);

/* Execution context. */
/* Returns whether interrupts are off, or this is a hard interrupt. */
bool obd_in_interrupt_off(void);
/*
 * Returns whether @bytes bytes should be decompressed in the current context,
 * and not by a worker, for a read with the I/O priority @ioprio: at most
 * at_once_bytes (a parameter) bytes, interrupts on, no reschedule pending, and
 * not the idle class.
 */
bool obd_at_once(unsigned int bytes, u16 ioprio);
/* Returns whether the I/O priority @ioprio is of the idle class. */
bool obd_is_idle_class(u16 ioprio);
/*
 * bio_endio() with bio_in_atomic() true in any context, so that the completion
 * of the layer above does nothing that may wait.
 */
void obd_bio_endio_atomic(struct bio *bio);
bool obd_fatal_signal_pending(void);
void obd_cond_resched(void);
void obd_cond_resched_tasks_rcu_qs(void);
void obd_synchronize_rcu_tasks(void);

/* Locks and work. The locks are for kernels before 7.3: see helpers.c. */
#ifndef OBD_SPINLOCK_IRQ
void obd_spin_lock_irq_disable(spinlock_t *lock);
bool obd_spin_trylock_irq_disable(spinlock_t *lock);
void obd_spin_unlock_irq_enable(spinlock_t *lock);
#endif
bool obd_cpu_online(u32 cpu);
/*
 * Returns the CPU to run a job from CPU @here: @here, or the next CPU of @idle
 * that is online and not isolated; nr_cpu_ids or more if there is none. Called
 * on @here with interrupts off. Overwrites @scratch.
 */
u32 obd_cpu_for_work(const struct cpumask *idle, struct cpumask *scratch,
		     u32 here);
void obd_init_work(struct work_struct *work, work_func_t func);
bool obd_schedule_work(struct work_struct *work);
/* INIT_DEFERRABLE_WORK(): the timer may be late if the CPU is idle. */
void obd_init_delayed_work(struct delayed_work *work, work_func_t func);
/* Queues on the power-efficient workqueue, @seconds seconds from now. */
bool obd_schedule_delayed_work(struct delayed_work *work, unsigned int seconds);
/* alloc_workqueue() with the name @name and WQ_MAX_ACTIVE. */
struct workqueue_struct *obd_alloc_workqueue(const char *name,
					     unsigned int flags);

/* Per-CPU counters. A sum may miss what other CPUs add meanwhile. */
u64 __percpu *obd_counter_alloc(void);
void obd_counter_add(u64 __percpu *counter, u64 n);
u64 obd_counter_sum(u64 __percpu *counter);

/*
 * The memory of the cache of all zfile devices in bytes: what it has (parameter
 * cache_bytes) and its limit (cache_limit_bytes).
 */
/* Sets the limit to its default if it is 0. */
void obd_cache_init(void);
u64 obd_cache_limit(void);
u64 obd_cache_bytes(void);
/* Adds @bytes, which may be negative, to the memory that the cache has. */
void obd_cache_add(s64 bytes);

/* Messages and events. */
void obd_ratelimit_default_init(struct ratelimit_state *rs);
/*
 * Sends a change uevent of @disk with the variable @variable=@value. May sleep.
 */
void obd_alert_uevent(struct gendisk *disk, const char *variable, u64 value);

#endif /* _DM_OVERLAYBD_H */
