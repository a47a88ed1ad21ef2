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

/*
 * dma-buf registered buffers: the series "Add dmabuf read/write via io_uring", v7, September 2026,
 * its uAPI unchanged since v3. Not in a released kernel yet.
 */
#define DMB_REGISTER_BUFFERS_UPDATE 16
#define DMB_RSRC_UPDATE_EXTENDED (1U << 1)

enum dmb_regbuf_type {
	DMB_REGBUF_EMPTY = 0,
	DMB_REGBUF_UADDR = 1,
	DMB_REGBUF_DMABUF = 2,
};

struct dmb_rsrc_update2 {
	uint32_t offset;
	uint32_t flags; /* `resv` in older headers */
	uint64_t data;	/* nr descriptors where flags has EXTENDED */
	uint64_t tags;
	uint32_t nr;
	uint32_t resv2;
};

static_assert(sizeof(struct dmb_rsrc_update2) == 32, "struct io_uring_rsrc_update2");
static_assert(offsetof(struct dmb_rsrc_update2, data) == 8, "struct io_uring_rsrc_update2");
static_assert(offsetof(struct dmb_rsrc_update2, nr) == 24, "struct io_uring_rsrc_update2");

struct dmb_regbuf_desc {
	uint32_t type;
	uint32_t flags;
	uint64_t size;
	uint64_t uaddr;
	int32_t dmabuf_fd;
	int32_t target_fd;
	uint64_t resv[6];
};

static_assert(sizeof(struct dmb_regbuf_desc) == 80, "struct io_uring_regbuf_desc");
static_assert(offsetof(struct dmb_regbuf_desc, size) == 8, "struct io_uring_regbuf_desc");
static_assert(offsetof(struct dmb_regbuf_desc, uaddr) == 16, "struct io_uring_regbuf_desc");
static_assert(offsetof(struct dmb_regbuf_desc, dmabuf_fd) == 24, "struct io_uring_regbuf_desc");
static_assert(offsetof(struct dmb_regbuf_desc, target_fd) == 28, "struct io_uring_regbuf_desc");
static_assert(offsetof(struct dmb_regbuf_desc, resv) == 32, "struct io_uring_regbuf_desc");

/* madvise(2): include/uapi/asm-generic/mman-common.h, Linux 5.14. */
#define DMB_MADV_POPULATE_WRITE 23

#endif
