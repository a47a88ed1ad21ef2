/* SPDX-License-Identifier: MIT */
/* Kernel interfaces that the headers of supported distributions may lack. */
#ifndef DMABUF_UAPI_H
#define DMABUF_UAPI_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* statx(2) with STATX_DIOALIGN: include/uapi/linux/stat.h, Linux 6.1. */
#define DMB_STATX_DIOALIGN 0x2000U

#define DMB_STATX_MNT_ID_UNIQUE 0x4000U /* Linux 6.8 */

struct dmb_statx {
	uint32_t mask;
	uint8_t before[24];
	uint16_t mode;
	uint8_t number[10];
	uint64_t size;
	uint64_t blocks;
	uint8_t between[80];
	uint32_t dev_major; /* of the filesystem; 0 where it has no block device */
	uint32_t dev_minor;
	uint64_t mnt_id;
	uint32_t dio_mem_align;
	uint32_t dio_offset_align;
	uint8_t after[96];
};

static_assert(offsetof(struct dmb_statx, mode) == 0x1c, "statx(2)");
static_assert(offsetof(struct dmb_statx, size) == 0x28, "statx(2)");
static_assert(offsetof(struct dmb_statx, dev_major) == 0x88, "statx(2)");
static_assert(offsetof(struct dmb_statx, mnt_id) == 0x90, "statx(2)");
static_assert(offsetof(struct dmb_statx, dio_mem_align) == 0x98, "statx(2)");
static_assert(sizeof(struct dmb_statx) == 256, "statx(2)");

/* openat2(2): include/uapi/linux/openat2.h, Linux 5.6; the number is common to all. */
#define DMB_SYS_OPENAT2 437
#define DMB_RESOLVE_NO_MAGICLINKS 0x02U
#define DMB_RESOLVE_BENEATH 0x08U

struct dmb_open_how {
	uint64_t flags;
	uint64_t mode;
	uint64_t resolve;
};

static_assert(sizeof(struct dmb_open_how) == 24, "openat2(2), OPEN_HOW_SIZE_VER0");

/* cachestat(2): include/uapi/linux/mman.h, Linux 6.5; the number is common to all but alpha.
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
	uint64_t data;	/* nr descriptors if flags has EXTENDED */
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

/*
 * NVMe passthrough: include/uapi/linux/nvme_ioctl.h. One layout serves struct nvme_passthru_cmd,
 * with NVME_IOCTL_IO_CMD, and struct nvme_uring_cmd, with io_uring: Linux 5.19.
 */
struct dmb_nvme_cmd {
	uint8_t opcode;
	uint8_t flags;
	uint16_t rsvd1;
	uint32_t nsid;
	uint32_t cdw2;
	uint32_t cdw3;
	uint64_t metadata;
	uint64_t addr;
	uint32_t metadata_len;
	uint32_t data_len;
	uint32_t cdw10;
	uint32_t cdw11;
	uint32_t cdw12;
	uint32_t cdw13;
	uint32_t cdw14;
	uint32_t cdw15;
	uint32_t timeout_ms;
	uint32_t result; /* rsvd2 with io_uring, where the completion has the result */
};

static_assert(sizeof(struct dmb_nvme_cmd) == 72, "struct nvme_uring_cmd");
static_assert(offsetof(struct dmb_nvme_cmd, metadata) == 16, "struct nvme_uring_cmd");
static_assert(offsetof(struct dmb_nvme_cmd, addr) == 24, "struct nvme_uring_cmd");
static_assert(offsetof(struct dmb_nvme_cmd, data_len) == 36, "struct nvme_uring_cmd");
static_assert(offsetof(struct dmb_nvme_cmd, cdw10) == 40, "struct nvme_uring_cmd");
static_assert(offsetof(struct dmb_nvme_cmd, result) == 68, "struct nvme_uring_cmd");

#define DMB_NVME_IOCTL_IO_CMD _IOWR('N', 0x43, struct dmb_nvme_cmd)
#define DMB_NVME_URING_CMD_IO _IOWR('N', 0x80, struct dmb_nvme_cmd)

/*
 * The ublk driver: include/uapi/linux/ublk_cmd.h. Linux 6.0; commands encoded as ioctls, 6.4.
 */
struct dmb_ublk_ctrl_cmd {
	uint32_t dev_id;
	uint16_t queue_id;
	uint16_t len;
	uint64_t addr;
	uint64_t data;
	uint16_t dev_path_len;
	uint16_t pad;
	uint32_t reserved;
};

static_assert(sizeof(struct dmb_ublk_ctrl_cmd) == 32, "struct ublksrv_ctrl_cmd");
static_assert(offsetof(struct dmb_ublk_ctrl_cmd, addr) == 8, "struct ublksrv_ctrl_cmd");
static_assert(offsetof(struct dmb_ublk_ctrl_cmd, data) == 16, "struct ublksrv_ctrl_cmd");

struct dmb_ublk_io_cmd {
	uint16_t q_id;
	uint16_t tag;
	int32_t result;
	uint64_t addr;
};

static_assert(sizeof(struct dmb_ublk_io_cmd) == 16, "struct ublksrv_io_cmd");
static_assert(offsetof(struct dmb_ublk_io_cmd, result) == 4, "struct ublksrv_io_cmd");

struct dmb_ublk_io_desc {
	uint32_t op_flags;
	uint32_t nr_sectors; /* of 512 bytes */
	uint64_t start_sector;
	uint64_t addr;
};

static_assert(sizeof(struct dmb_ublk_io_desc) == 24, "struct ublksrv_io_desc");
static_assert(offsetof(struct dmb_ublk_io_desc, start_sector) == 8, "struct ublksrv_io_desc");

#define DMB_UBLK_IO_FETCH_REQ _IOWR('u', 0x20, struct dmb_ublk_io_cmd)
#define DMB_UBLK_IO_COMMIT_AND_FETCH_REQ _IOWR('u', 0x21, struct dmb_ublk_io_cmd)
#define DMB_UBLK_OP_MASK 0xffU
#define DMB_UBLK_OP_READ 0U
#define DMB_UBLK_OP_WRITE 1U
#define DMB_UBLK_OP_FLUSH 2U
/* Where pread(2) and pwrite(2) find the pages of a tag's request: UBLK_F_USER_COPY, Linux 6.5. */
#define DMB_UBLK_IO_BUF_OFFSET 0x80000000U
#define DMB_UBLK_TAG_OFF 25

/* madvise(2): include/uapi/asm-generic/mman-common.h, Linux 5.14. */
#define DMB_MADV_POPULATE_WRITE 23
/* madvise(2): include/uapi/asm-generic/mman-common.h, Linux 6.1. */
#define DMB_MADV_COLLAPSE 25

#endif
