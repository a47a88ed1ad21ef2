/* SPDX-License-Identifier: MIT */
/*
 * A buffer as a block device, by the kernel's ublk driver: include/uapi/linux/ublk_cmd.h.
 *
 * The driver hands each request to the thread that fetched it. With UBLK_F_USER_COPY (Linux 6.5)
 * pread(2) and pwrite(2) on the character device copy between the pages of a request and memory of
 * the caller. That memory is the buffer's mapping itself, so each byte is copied once, by the
 * kernel.
 */
#include <errno.h>
#include <linux/dma-buf.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "internal.h"
#include "uapi.h"

#define SECTOR_SHIFT 9
#define BLOCK (64U << 10)

/* Queue a command on an open file: `size` bytes that extend from the SQE's field cmd. */
static void queue(struct io_uring *uring, int fd, uint32_t op, const void *cmd, size_t size,
		  uint64_t data)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(uring); /* never NULL: see the callers */

	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, fd, NULL, 0, 0);
	sqe->cmd_op = op;
	memcpy((uint8_t *)sqe + offsetof(struct io_uring_sqe, cmd), cmd, size);
	sqe->user_data = data;
}

/* Submit what is queued and wait for a completion, through signals and shortages of memory. */
static int submit_and_wait(struct io_uring *uring, struct io_uring_cqe **ret)
{
	int rc;

	do {
		rc = io_uring_submit_and_wait_timeout(uring, ret, 1, NULL, NULL);
	} while (rc == -EINTR || rc == -EAGAIN || rc == -EBUSY || rc == -ENOMEM);
	return rc < 0 ? rc : 0;
}

int dmb_ublk_control(int control, uint32_t op, uint32_t device, void *data, uint16_t size,
		     uint64_t value)
{
	const struct dmb_ublk_ctrl_cmd cmd = {
		.dev_id = device,
		.queue_id = UINT16_MAX, /* it is not about one queue */
		.len = size,
		.addr = (uintptr_t)data,
		.data = value,
	};
	struct io_uring_cqe *cqe;
	struct io_uring uring;
	int rc = dmb_uring_setup(&uring, 1, DMB_RING_PASSTHROUGH);

	if (rc)
		return rc;
	queue(&uring, control, op, &cmd, sizeof(cmd), 0);
	rc = submit_and_wait(&uring, &cqe);
	if (!rc)
		rc = cqe->res;
	io_uring_queue_exit(&uring);
	return rc;
}

/* Wait for the devices that use a dma-buf, then begin access by the CPU. Returns 0 or -errno. */
static int begin_access(int dmabuf, uint64_t flags, int fence_ms)
{
	struct dma_buf_sync sync = {.flags = DMA_BUF_SYNC_START | flags};
	struct pollfd one = {
		.fd = dmabuf,
		.events = flags & DMA_BUF_SYNC_WRITE ? POLLOUT : POLLIN,
	};
	int rc;

	do {
		rc = poll(&one, 1, fence_ms);
	} while (rc < 0 && errno == EINTR);
	if (rc <= 0)
		return rc ? -errno : -ETIMEDOUT;
	do {
		rc = ioctl(dmabuf, DMA_BUF_IOCTL_SYNC, &sync);
	} while (rc && (errno == EINTR || errno == EAGAIN));
	return rc ? -errno : 0;
}

static void end_access(int dmabuf, uint64_t flags)
{
	struct dma_buf_sync sync = {.flags = DMA_BUF_SYNC_END | flags};

	while (ioctl(dmabuf, DMA_BUF_IOCTL_SYNC, &sync) && (errno == EINTR || errno == EAGAIN))
		;
}

/* Copy between memory and the pages of a request at a position. Returns 0 or -errno. */
static int copy_by_kernel(int fd, int direction, uint64_t address, uint64_t size, uint64_t position)
{
	int64_t n = dmb_read_write(direction, fd, address, size, position);

	if (n < 0)
		return (int)n;
	return (uint64_t)n == size ? 0 : -EIO;
}

/* Copy between the buffer and the pages of a tag's request. Returns 0 or -errno. */
static int copy(const struct dmb_job *job, int direction, uint64_t start, uint64_t size,
		unsigned tag)
{
	uint64_t position = DMB_UBLK_IO_BUF_OFFSET + ((uint64_t)tag << DMB_UBLK_TAG_OFF);
	uint8_t *memory = (uint8_t *)(uintptr_t)(job->base + start);
	uint8_t block[BLOCK];
	int rc = copy_by_kernel(job->fd, direction, (uintptr_t)memory, size, position);

	if (rc != -EIO)
		return rc;
	/* Before Linux 6.19 the driver pins the memory, which most mappings of dma-bufs refuse. */
	for (size_t part; size; size -= part, memory += part, position += part) {
		part = dmb_min(size, sizeof(block));
		if (direction == DMB_WRITE)
			memcpy(block, memory, part);
		if (copy_by_kernel(job->fd, direction, (uintptr_t)block, part, position))
			return -EIO;
		if (direction == DMB_READ)
			memcpy(memory, block, part);
	}
	return 0;
}

/* Carry out a request. Returns its result: a number of bytes or -errno. */
static int32_t serve(const struct dmb_job *job, const struct dmb_ublk_io_desc *desc, unsigned tag,
		     int fence_ms)
{
	const uint64_t start = desc->start_sector << SECTOR_SHIFT;
	const uint64_t size = (uint64_t)desc->nr_sectors << SECTOR_SHIFT;
	const uint32_t op = desc->op_flags & DMB_UBLK_OP_MASK;
	uint64_t flags = DMA_BUF_SYNC_READ;
	uint64_t first = 0, slab = 0, end = 0;
	int rc = 0;

	if (op == DMB_UBLK_OP_FLUSH)
		return 0; /* a write is in the buffer when it completes */
	if (op != DMB_UBLK_OP_READ && op != DMB_UBLK_OP_WRITE)
		return -EOPNOTSUPP;
	if (start > job->size || size > job->size - start)
		return -EIO;
	if (job->slabs && size) {
		slab = first = start / job->slab_size;
		end = (start + size - 1) / job->slab_size + 1;
	}
	if (op == DMB_UBLK_OP_WRITE) /* a page that is written in part keeps the rest */
		flags = (start | size) % dmb_page() ? DMA_BUF_SYNC_RW : DMA_BUF_SYNC_WRITE;
	for (; !rc && slab < end; slab += !rc)
		rc = begin_access(job->slabs[slab], flags, fence_ms);
	if (!rc) /* a read of the device writes the request's pages */
		rc = copy(job, op == DMB_UBLK_OP_READ ? DMB_WRITE : DMB_READ, start, size, tag);
	while (slab > first)
		end_access(job->slabs[--slab], flags);
	return rc ? rc : (int32_t)size;
}

static void queue_fetch(struct io_uring *uring, int fd, uint32_t op, unsigned tag, int32_t result)
{
	const struct dmb_ublk_io_cmd cmd = {.tag = (uint16_t)tag, .result = result};

	queue(uring, fd, op, &cmd, sizeof(cmd), tag);
}

/* Answer requests until every tag has ended, or one has failed. */
static int answer(const struct dmb_job *job, struct io_uring *uring,
		  const struct dmb_ublk_io_desc *descs, unsigned depth, int fence_ms)
{
	struct io_uring_cqe *cqe;

	while (depth) {
		int rc = submit_and_wait(uring, &cqe);

		if (rc)
			return rc;
		do {
			unsigned tag = (unsigned)cqe->user_data;

			rc = cqe->res;
			io_uring_cqe_seen(uring, cqe);
			if (rc == -ENODEV) /* UBLK_IO_RES_ABORT: the device is being stopped */
				depth--;
			else if (rc)
				return rc;
			else /* each tag has one command at most, so there is room in the queue */
				queue_fetch(uring, job->fd, DMB_UBLK_IO_COMMIT_AND_FETCH_REQ, tag,
					    serve(job, &descs[tag], tag, fence_ms));
		} while (!io_uring_peek_cqe(uring, &cqe));
	}
	return 0;
}

int dmb_ublk_serve(const struct dmb_job *job, unsigned depth, int fence_ms, int ready)
{
	const size_t size = dmb_align_up(depth * sizeof(struct dmb_ublk_io_desc), dmb_page());
	struct io_uring_cqe *cqe;
	struct io_uring uring;
	void *descs;
	int rc = dmb_uring_setup(&uring, depth, DMB_RING_SINGLE_ISSUER);

	if (rc)
		return rc;
	descs = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, job->fd, 0);
	if (descs == MAP_FAILED) {
		rc = -errno;
		goto exit;
	}
	/* The child of a fork must not keep the device: no copies of the mappings, and the caller
	   closes its descriptors there. */
	madvise(descs, size, MADV_DONTFORK);
	io_uring_ring_dontfork(&uring);
	/* Memory reclaim in this thread must not wait for writes to the device that it serves.
	   Without CAP_SYS_RESOURCE the kernel refuses, and the device works nevertheless. */
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
	for (unsigned tag = 0; tag < depth; tag++)
		queue_fetch(&uring, job->fd, DMB_UBLK_IO_FETCH_REQ, tag, 0);
	rc = io_uring_submit(&uring);
	if (rc >= 0) /* no request arrives before the device is started, only errors do */
		rc = io_uring_peek_cqe(&uring, &cqe) ? 0 : cqe->res;
	if (!rc && eventfd_write(ready, (eventfd_t)uring.ring_fd))
		rc = -errno;
	if (!rc)
		rc = answer(job, &uring, descs, depth, fence_ms);
	munmap(descs, size);
exit:
	io_uring_queue_exit(&uring);
	return rc;
}
