/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shims for inline functions and macros of the kernel, which Rust cannot call.
 * A shim calls the function or macro that has the same name without "obd_",
 * unless its comment, or the comment of its group, describes something else.
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
/* Gets a reference: it keeps the memory of @disk after the disk is deleted. */
void obd_get_disk(struct gendisk *disk);
/* Puts the reference. May sleep. */
void obd_put_disk(struct gendisk *disk);

/* DAX. */
/*
 * dax_direct_access() with DAX_ACCESS. Returns -EOPNOTSUPP in a kernel without
 * CONFIG_FS_DAX.
 */
long obd_dax_direct_access(struct dax_device *dax_dev, pgoff_t pgoff,
			   long nr_pages, void **kaddr, unsigned long *pfn);
void *obd_dax_holder(struct dax_device *dax_dev);

/* References to this module. */
/* Gets one. The module must have a reference already. */
void obd_module_get(void);
void obd_module_put(void);

/* Bios and pages. */
/* memcpy() and memset(). User space may change the memory at the same time. */
void obd_memcpy(void *to, const void *from, size_t len);
void obd_memset(void *to, int byte, size_t len);
void *obd_page_address(struct page *page);
/*
 * Adds @pages, the number of pages from @page on, to the reclaimable memory:
 * KReclaimable and MemAvailable in /proc/meminfo. If @pages is negative, the
 * caller is about to free -@pages pages: subtracts them, and counts them as
 * reclaimed if the current task is reclaiming memory.
 */
void obd_count_reclaimable(struct page *page, long pages);
void obd_bio_set_dev(struct bio *bio, struct block_device *bdev);
void *obd_bvec_virt(struct bio_vec *bvec);
struct bio_vec obd_mp_bvec_iter_bvec(struct bio_vec *vec,
				     struct bvec_iter *iter);
void obd_bio_advance_iter_single(struct bio *bio, struct bvec_iter *iter,
				 unsigned int bytes);
/* flush_dcache_page() for all pages of @bio, if the architecture needs it. */
void obd_flush_dcache_bio(struct bio *bio);
void obd_invalidate_kernel_vmap_range(void *addr, int size);
/* Charges the I/O of @bio to the root control group. */
void obd_bio_associate_root(struct bio *bio);

/* Execution context. */
/*
 * Returns whether to decompress @bytes bytes in the current context, and not in
 * a worker, for a read with the I/O priority @ioprio: if @bytes is at most the
 * module parameter at_once_bytes, interrupts are on, no reschedule is pending,
 * and the priority is not of the idle class.
 */
bool obd_at_once(unsigned int bytes, u16 ioprio);
/* Returns whether the I/O priority @ioprio is of the idle class. */
bool obd_is_idle_class(u16 ioprio);
/*
 * bio_endio(), with bio_in_atomic() true in any context, so that the completion
 * of the file system or device on top does nothing that may wait.
 */
void obd_bio_endio_atomic(struct bio *bio);
/* For the current task. */
bool obd_fatal_signal_pending(void);
void obd_cond_resched(void);
void obd_cond_resched_tasks_rcu_qs(void);
void obd_synchronize_rcu_tasks(void);

/*
 * Locks and work. The functions for locks are for kernels before 7.3, which do
 * not have them: see helpers.c.
 */
#ifndef OBD_SPINLOCK_IRQ
void obd_spin_lock_irq_disable(spinlock_t *lock);
bool obd_spin_trylock_irq_disable(spinlock_t *lock);
void obd_spin_unlock_irq_enable(spinlock_t *lock);
#endif
bool obd_cpu_online(u32 cpu);
/*
 * Returns the CPU whose worker to wake for a job that CPU @here queues: @here
 * if it is in @idle and not isolated, otherwise the next CPU in @idle that is
 * online and not isolated, where CPU 0 comes after the last CPU; nr_cpu_ids or
 * more if there is none. @idle has the CPUs whose worker has nothing to do.
 * Must be called on @here with interrupts off. Overwrites @scratch.
 */
u32 obd_cpu_for_work(const struct cpumask *idle, struct cpumask *scratch,
		     u32 here);
void obd_init_work(struct work_struct *work, work_func_t func);
bool obd_schedule_work(struct work_struct *work);
/* INIT_DEFERRABLE_WORK(): the timer may be late if the CPU is idle. */
void obd_init_delayed_work(struct delayed_work *work, work_func_t func);
/* Queues @work on the power-efficient workqueue, @seconds seconds from now. */
bool obd_schedule_delayed_work(struct delayed_work *work, unsigned int seconds);
/* alloc_workqueue() with the name @name and WQ_MAX_ACTIVE. */
struct workqueue_struct *obd_alloc_workqueue(const char *name,
					     unsigned int flags);

/*
 * Counters: a u64 for each CPU, from alloc_percpu(). obd_counter_add() adds to
 * that of this CPU; obd_counter_sum() adds up those of all possible CPUs, and
 * may miss what other CPUs add at the same time.
 */
u64 __percpu *obd_counter_alloc(void);
void obd_counter_add(u64 __percpu *counter, u64 n);
u64 obd_counter_sum(u64 __percpu *counter);

/*
 * The cache of all zfile devices. obd_cache_bytes() returns the memory that it
 * uses (module parameter cache_bytes), obd_cache_limit() the limit of that
 * (cache_limit_bytes), both in bytes.
 */
/* Sets the limit to its default if the limit is 0. */
void obd_cache_init(void);
u64 obd_cache_limit(void);
u64 obd_cache_bytes(void);
/* Adds @bytes, which may be negative, to the memory that the cache uses. */
void obd_cache_add(s64 bytes);

/* Messages and events. */
void obd_ratelimit_default_init(struct ratelimit_state *rs);
/*
 * Sends a change uevent of @disk with the variable @variable, set to @value.
 * May sleep.
 */
void obd_alert_uevent(struct gendisk *disk, const char *variable, u64 value);

#endif /* _DM_OVERLAYBD_H */
