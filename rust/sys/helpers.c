// SPDX-License-Identifier: GPL-2.0
/*
 * Shims for inline functions and macros: see include/dm_overlaybd.h.
 */
#include <linux/blk-cgroup.h>
#include <linux/cpumask.h>
#include <linux/highmem.h>
#include <linux/ioprio.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/sched/isolation.h>
#include <linux/sched/signal.h>
#include <linux/swap.h>

#include "dm_overlaybd.h"

sector_t obd_bdev_nr_sectors(struct block_device *bdev)
{
	return bdev_nr_sectors(bdev);
}

unsigned int obd_bdev_logical_block_size(struct block_device *bdev)
{
	return bdev_logical_block_size(bdev);
}

bool obd_bdev_may_stack(struct block_device *bdev)
{
	return bdev->bd_disk->fops->submit_bio;
}

sector_t obd_get_start_sect(struct block_device *bdev)
{
	return get_start_sect(bdev);
}

sector_t obd_get_capacity(struct gendisk *disk)
{
	return get_capacity(disk);
}

unsigned int obd_disk_openers(struct gendisk *disk)
{
	return disk_openers(disk);
}

long obd_dax_direct_access(struct dax_device *dax_dev, pgoff_t pgoff,
			   long nr_pages, void **kaddr, unsigned long *pfn)
{
#if IS_ENABLED(CONFIG_FS_DAX)
	return dax_direct_access(dax_dev, pgoff, nr_pages, DAX_ACCESS, kaddr,
				 pfn);
#else
	return -EOPNOTSUPP;
#endif
}

void *obd_dax_holder(struct dax_device *dax_dev)
{
	return dax_holder(dax_dev);
}

void obd_get_disk(struct gendisk *disk)
{
	get_device(disk_to_dev(disk));
}

void obd_put_disk(struct gendisk *disk)
{
	put_device(disk_to_dev(disk));
}

void obd_module_get(void)
{
	__module_get(THIS_MODULE);
}

void obd_module_put(void)
{
	module_put(THIS_MODULE);
}

void obd_count_reclaimable(struct page *page, long pages)
{
	mod_node_page_state(page_pgdat(page), NR_KERNEL_MISC_RECLAIMABLE, pages);
	/* Report freed pages to the task that reclaims memory, as slab does. */
	if (pages < 0)
		mm_account_reclaimed_pages(-pages);
}

void obd_bio_set_dev(struct bio *bio, struct block_device *bdev)
{
	bio_set_dev(bio, bdev);
}

void obd_memcpy(void *to, const void *from, size_t len)
{
	memcpy(to, from, len);
}

void obd_memset(void *to, int byte, size_t len)
{
	memset(to, byte, len);
}

void *obd_page_address(struct page *page)
{
	return page_address(page);
}

void *obd_bvec_virt(struct bio_vec *bvec)
{
	return bvec_virt(bvec);
}

struct bio_vec obd_mp_bvec_iter_bvec(struct bio_vec *vec,
				     struct bvec_iter *iter)
{
	return mp_bvec_iter_bvec(vec, *iter);
}

void obd_bio_advance_iter_single(struct bio *bio, struct bvec_iter *iter,
				 unsigned int bytes)
{
	bio_advance_iter_single(bio, iter, bytes);
}

void obd_flush_dcache_bio(struct bio *bio)
{
#if ARCH_IMPLEMENTS_FLUSH_DCACHE_PAGE
	struct bvec_iter iter;
	struct bio_vec bvec;

	bio_for_each_segment(bvec, bio, iter)
		flush_dcache_page(bvec.bv_page);
#endif
}

void obd_invalidate_kernel_vmap_range(void *addr, int size)
{
	invalidate_kernel_vmap_range(addr, size);
}

void obd_bio_associate_root(struct bio *bio)
{
#ifdef CONFIG_BLK_CGROUP
	bio_associate_blkg_from_css(bio, blkcg_root_css);
#endif
}

/* Whether interrupts are off, or this is a hard interrupt. */
static bool in_interrupt_off(void)
{
	return in_hardirq() || irqs_disabled();
}

bool obd_is_idle_class(u16 ioprio)
{
	return IOPRIO_PRIO_CLASS(ioprio) == IOPRIO_CLASS_IDLE;
}

static unsigned int at_once_bytes = 16 << 10;
module_param(at_once_bytes, uint, 0644);
MODULE_PARM_DESC(at_once_bytes,
		 "Decompress LZ4 reads of up to this many bytes without a worker");

bool obd_at_once(unsigned int bytes, u16 ioprio)
{
	/* With lazy preemption need_resched() is false until the next tick. */
	return bytes <= READ_ONCE(at_once_bytes) && !in_interrupt_off() &&
	       !need_resched() &&
	       !test_thread_flag(TIF_NEED_RESCHED_LAZY) &&
	       !obd_is_idle_class(ioprio);
}

void obd_bio_endio_atomic(struct bio *bio)
{
	/*
	 * Makes bio_in_atomic() true, also on PREEMPT_RT, so that the file
	 * system or device on top doesn't sleep in its completion.
	 */
	rcu_read_lock();
	bio_endio(bio);
	rcu_read_unlock();
}

bool obd_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

void obd_cond_resched(void)
{
	cond_resched();
}

void obd_cond_resched_tasks_rcu_qs(void)
{
	cond_resched_tasks_rcu_qs();
}

void obd_synchronize_rcu_tasks(void)
{
	synchronize_rcu_tasks();
}

/*
 * Only for kernels before 7.3. From 7.3 on, the kernel crate has a SpinLockIrq,
 * and Kbuild defines OBD_SPINLOCK_IRQ.
 */
#ifndef OBD_SPINLOCK_IRQ
/*
 * The number of locks that a CPU has taken with obd_spin_lock_irq_disable() and
 * still holds, and its interrupt state before it took the first one.
 */
static DEFINE_PER_CPU(unsigned int, obd_irq_depth);
static DEFINE_PER_CPU(unsigned long, obd_irq_flags);

static void irq_disable(void)
{
	unsigned long flags;

	/* On PREEMPT_RT spinlocks may sleep, and leave interrupts on. */
	if (IS_ENABLED(CONFIG_PREEMPT_RT))
		return;
	preempt_disable();
	local_irq_save(flags);
	if (__this_cpu_inc_return(obd_irq_depth) == 1)
		__this_cpu_write(obd_irq_flags, flags);
}

static void irq_enable(void)
{
	if (IS_ENABLED(CONFIG_PREEMPT_RT))
		return;
	if (__this_cpu_dec_return(obd_irq_depth) == 0)
		local_irq_restore(__this_cpu_read(obd_irq_flags));
	preempt_enable();
}

void obd_spin_lock_irq_disable(spinlock_t *lock)
{
	irq_disable();
	spin_lock(lock);
}

bool obd_spin_trylock_irq_disable(spinlock_t *lock)
{
	irq_disable();
	if (spin_trylock(lock))
		return true;
	irq_enable();
	return false;
}

void obd_spin_unlock_irq_enable(spinlock_t *lock)
{
	spin_unlock(lock);
	irq_enable();
}
#endif

bool obd_cpu_online(u32 cpu)
{
	return cpu_online(cpu);
}

u32 obd_cpu_for_work(const struct cpumask *idle, struct cpumask *scratch,
		     u32 here)
{
	u32 cpu = here;

	rcu_read_lock();
	if (!cpumask_test_cpu(here, idle) ||
	    !housekeeping_cpu(here, HK_TYPE_DOMAIN) ||
	    !housekeeping_cpu(here, HK_TYPE_WQ)) {
		/*
		 * Combines masks instead of testing CPU by CPU: thousands of
		 * CPUs may be offline or isolated.
		 */
		if (cpumask_and(scratch, idle, cpu_online_mask) &&
		    cpumask_and(scratch, scratch,
				housekeeping_cpumask(HK_TYPE_DOMAIN)))
			cpu = cpumask_next_and_wrap(here, scratch,
						    housekeeping_cpumask(HK_TYPE_WQ));
		else
			cpu = nr_cpu_ids;
	}
	rcu_read_unlock();
	return cpu;
}

void obd_init_work(struct work_struct *work, work_func_t func)
{
	INIT_WORK(work, func);
}

struct workqueue_struct *obd_alloc_workqueue(const char *name,
					     unsigned int flags)
{
	return alloc_workqueue("%s", flags, WQ_MAX_ACTIVE, name);
}

u64 __percpu *obd_counter_alloc(void)
{
	return alloc_percpu(u64);
}

void obd_counter_add(u64 __percpu *counter, u64 n)
{
	this_cpu_add(*counter, n);
}

u64 obd_counter_sum(u64 __percpu *counter)
{
	u64 sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += READ_ONCE(*per_cpu_ptr(counter, cpu));
	return sum;
}

bool obd_schedule_work(struct work_struct *work)
{
	return schedule_work(work);
}

void obd_init_delayed_work(struct delayed_work *work, work_func_t func)
{
	INIT_DEFERRABLE_WORK(work, func);
}

bool obd_schedule_delayed_work(struct delayed_work *work, unsigned int seconds)
{
	return queue_delayed_work(system_power_efficient_wq, work, seconds * HZ);
}

/* Default limit of the cache, in percent of all memory. */
#define CACHE_PERCENT	5

static unsigned long cache_limit_bytes;
static atomic_long_t cache_bytes;

static unsigned long cache_limit_default(void)
{
	return mult_frac(totalram_pages(), CACHE_PERCENT, 100) << PAGE_SHIFT;
}

static int cache_limit_set(const char *val, const struct kernel_param *kp)
{
	unsigned long bytes;
	int ret = kstrtoul(val, 0, &bytes);

	if (!ret)
		WRITE_ONCE(cache_limit_bytes, bytes ?: cache_limit_default());
	return ret;
}

static const struct kernel_param_ops cache_limit_ops = {
	.set = cache_limit_set,
	.get = param_get_ulong,
};
module_param_cb(cache_limit_bytes, &cache_limit_ops, &cache_limit_bytes, 0644);
MODULE_PARM_DESC(cache_limit_bytes,
		 "Limit of the cache of all zfile devices in bytes; 0 for 5 % of all memory");

/*
 * Needed although the parameter is read-only: if the module is loaded with a
 * value for it, the kernel calls this function, without a check for NULL.
 */
static int cache_bytes_set(const char *val, const struct kernel_param *kp)
{
	return -EPERM;
}

static int cache_bytes_get(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%llu\n", obd_cache_bytes());
}

static const struct kernel_param_ops cache_bytes_ops = {
	.set = cache_bytes_set,
	.get = cache_bytes_get,
};
module_param_cb(cache_bytes, &cache_bytes_ops, NULL, 0444);
MODULE_PARM_DESC(cache_bytes, "Memory that the cache uses now, in bytes");

void obd_cache_init(void)
{
	if (!cache_limit_bytes)
		cache_limit_bytes = cache_limit_default();
}

u64 obd_cache_limit(void)
{
	return READ_ONCE(cache_limit_bytes);
}

u64 obd_cache_bytes(void)
{
	return max(atomic_long_read(&cache_bytes), 0L);
}

void obd_cache_add(s64 bytes)
{
	atomic_long_add(bytes, &cache_bytes);
}

void obd_ratelimit_default_init(struct ratelimit_state *rs)
{
	ratelimit_default_init(rs);
}

void obd_alert_uevent(struct gendisk *disk, const char *variable, u64 value)
{
	char assignment[64];
	char *env[2] = { assignment };

	snprintf(assignment, sizeof(assignment), "%s=%llu", variable, value);
	kobject_uevent_env(&disk_to_dev(disk)->kobj, KOBJ_CHANGE, env);
}

MODULE_VERSION(OBD_VERSION);
