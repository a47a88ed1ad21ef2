/* SPDX-License-Identifier: MIT */
/* Kernel interfaces newer than the headers of the systems this builds on. */
#ifndef DMABUF_UAPI_H
#define DMABUF_UAPI_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

/* statx(2) with STATX_DIOALIGN: include/uapi/linux/stat.h, Linux 6.1. */
#define DMB_STATX_DIOALIGN 0x2000U

struct dmb_statx {
	uint32_t mask;
	uint8_t before[148];
	uint32_t dio_mem_align;
	uint32_t dio_offset_align;
	uint8_t after[96];
};

static_assert(offsetof(struct dmb_statx, dio_mem_align) == 0x98, "statx(2)");
static_assert(sizeof(struct dmb_statx) == 256, "statx(2)");

/* cachestat(2): include/uapi/linux/mman.h, Linux 6.5; one number on every architecture but alpha.
 */
#define DMB_SYS_CACHESTAT 451

struct dmb_cachestat_range {
	uint64_t offset;
	uint64_t size;
};

struct dmb_cachestat {
	uint64_t cached;
	uint64_t dirty;
	uint64_t writeback;
	uint64_t evicted;
	uint64_t recently_evicted;
};

static_assert(sizeof(struct dmb_cachestat) == 40, "cachestat(2)");

/* madvise(2): include/uapi/asm-generic/mman-common.h, Linux 5.14. */
#define DMB_MADV_POPULATE_WRITE 23

#endif
