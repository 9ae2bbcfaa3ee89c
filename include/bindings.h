/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The input of bindgen. rust/sys/bindgen_parameters lists the names to
 * generate. If the kernel crate has a binding for a type, that binding is used.
 */
#ifndef _DM_OVERLAYBD_BINDINGS_H
#define _DM_OVERLAYBD_BINDINGS_H

#include <linux/crc32.h>
#include <linux/device-mapper.h>
#include <linux/lz4.h>
#include <linux/zstd.h>

#include "dm_overlaybd.h"

/* bindgen cannot evaluate macros with casts. */
static const blk_mode_t OBD_BLK_OPEN_READ = BLK_OPEN_READ;
static const blk_mode_t OBD_BLK_OPEN_WRITE = BLK_OPEN_WRITE;
static const blk_features_t OBD_BLK_FEAT_POLL = BLK_FEAT_POLL;
static const blk_flags_t OBD_BLK_FLAG_MISALIGNED = BLK_FLAG_MISALIGNED;
static const blk_status_t OBD_BLK_STS_IOERR = BLK_STS_IOERR;
static const blk_status_t OBD_BLK_STS_AGAIN = BLK_STS_AGAIN;
static const blk_status_t OBD_BLK_STS_INVAL = BLK_STS_INVAL;
static const blk_status_t OBD_BLK_STS_NOTSUPP = BLK_STS_NOTSUPP;
static const size_t OBD_DM_NAME_LEN = DM_NAME_LEN;
static const blk_opf_t OBD_REQ_OP_MASK = REQ_OP_MASK;
static const blk_opf_t OBD_REQ_META = REQ_META;
/* Flags of memory allocations: see rust/block/memory.rs. */
static const gfp_t OBD_GFP_LARGE = GFP_KERNEL | __GFP_RETRY_MAYFAIL |
				   __GFP_NOWARN;
static const gfp_t OBD_GFP_OPTIONAL = GFP_NOWAIT | __GFP_NORETRY |
				      __GFP_NOWARN | __GFP_NOMEMALLOC;
static const gfp_t OBD_GFP_CACHE = GFP_NOWAIT | __GFP_NORETRY | __GFP_NOWARN |
				   __GFP_NOMEMALLOC | __GFP_RECLAIMABLE;
static const gfp_t OBD_GFP_PAGE = GFP_NOWAIT | __GFP_NORETRY | __GFP_NOWARN |
				  __GFP_NOMEMALLOC | __GFP_RECLAIMABLE;
static const gfp_t OBD_GFP_PAGES = __GFP_NORETRY | __GFP_NOWARN |
				   __GFP_NOMEMALLOC | __GFP_RECLAIMABLE |
				   __GFP_COMP;
/* Flags that a lower read inherits from the bio that needs its data. */
static const blk_opf_t OBD_REQ_INHERITED = REQ_FAILFAST_MASK | REQ_SYNC |
					   REQ_META | REQ_PRIO | REQ_RAHEAD |
					   REQ_BACKGROUND | REQ_NOWAIT;
/*
 * Flags that are not inherited if other reads may wait for the lower read,
 * which must then neither fail early nor be delayed.
 */
static const blk_opf_t OBD_REQ_ALONE = REQ_FAILFAST_MASK | REQ_RAHEAD |
				       REQ_BACKGROUND;
static const blk_opf_t OBD_REQ_RAHEAD = REQ_RAHEAD;
/* Not inherited if a worker submits the lower read: a worker may sleep. */
static const blk_opf_t OBD_REQ_NOWAIT = REQ_NOWAIT;

#endif /* _DM_OVERLAYBD_BINDINGS_H */
