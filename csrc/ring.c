/* SPDX-License-Identifier: MIT */
/* The io_uring backend, and the functions that are common to both backends. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"
#include "uapi.h"

#ifdef DMB_TESTING
void dmb_testing_wrap(struct dmb_ring *ring); /* tests/testing.c */
#else
#define dmb_testing_wrap(ring) ((void)(ring))
#endif

static void uring_destroy(struct dmb_ring *ring)
{
	io_uring_queue_exit(&ring->uring);
}

/* Get an SQE; submit if the queue is full, repeatedly while the kernel is short of memory. */
static struct io_uring_sqe *next_sqe(struct dmb_ring *ring)
{
	const struct timespec pause = {.tv_nsec = 1000000};
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);

	for (int tries = 0; !sqe && tries < 50; tries++) {
		if (tries)
			nanosleep(&pause, NULL);
		io_uring_submit(&ring->uring);
		sqe = io_uring_get_sqe(&ring->uring);
	}
	return sqe;
}

/* The ring has SQEs of 128 bytes, and `cmd` extends into their second half. */
static void prep_nvme(struct io_uring_sqe *sqe, int fd, const struct dmb_io *io)
{
	struct dmb_nvme_cmd command;

	dmb_nvme_command(io, &command);
	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, fd, NULL, 0, 0);
	sqe->cmd_op = DMB_NVME_URING_CMD_IO;
	if (io->buffer_slot >= 0) {
		sqe->uring_cmd_flags = IORING_URING_CMD_FIXED;
		sqe->buf_index = (uint16_t)io->buffer_slot;
	}
	memcpy((uint8_t *)sqe + offsetof(struct io_uring_sqe, cmd), &command, sizeof(command));
}

static int uring_issue(struct dmb_ring *ring, struct dmb_io *io)
{
	static struct __kernel_timespec pause = {.tv_nsec = DMB_PAUSE_NS};
	struct io_uring_sqe *sqe = next_sqe(ring);
	int fd = io->file_slot >= 0 ? io->file_slot : io->fd;

	if (!sqe)
		return -EBUSY;
	ring->issued = true;
	if (io->kind == DMB_PAUSE) {
		io_uring_prep_timeout(sqe, &pause, 0, 0);
	} else if (io->kind == DMB_FLUSH) {
		io_uring_prep_sync_file_range(sqe, fd, io->length, io->offset, DMB_FLUSH_FLAGS);
	} else if (!io->length) {
		io_uring_prep_nop(sqe); /* past the end, or a hole of the file */
	} else if (io->nsid) {
		prep_nvme(sqe, fd, io);
	} else if (io->buffer_slot < 0) {
		if (io->direction == DMB_READ)
			io_uring_prep_read(sqe, fd, io->address, io->length, io->offset);
		else
			io_uring_prep_write(sqe, fd, io->address, io->length, io->offset);
	} else {
		if (io->direction == DMB_READ)
			io_uring_prep_read_fixed(sqe, fd, io->address, io->length, io->offset,
						 io->buffer_slot);
		else
			io_uring_prep_write_fixed(sqe, fd, io->address, io->length, io->offset,
						  io->buffer_slot);
	}
	if (io->file_slot >= 0)
		sqe->flags |= IOSQE_FIXED_FILE;
	if (io->async)
		sqe->flags |= IOSQE_ASYNC;
	io_uring_sqe_set_data(sqe, io);
	return 0;
}

static int uring_wait(struct dmb_ring *ring, int timeout_ms)
{
	struct __kernel_timespec time = {
		.tv_sec = timeout_ms / 1000,
		.tv_nsec = (long long)(timeout_ms % 1000) * 1000000,
	};
	struct io_uring_cqe *cqe;
	int rc = io_uring_submit_and_wait_timeout(&ring->uring, &cqe, 1, &time, NULL);

	if (rc == -EAGAIN ||
	    rc == -EBUSY) /* no memory to submit more: wait for requests in flight */
		rc = io_uring_wait_cqe_timeout(&ring->uring, &cqe, &time);
	ring->ready = io_uring_cq_ready(&ring->uring);
	return rc == -ETIME || rc == -EINTR || rc >= 0 ? 0 : rc;
}

/* With DEFER_TASKRUN the kernel posts completions only when the thread requests events. */
static int uring_poll(struct dmb_ring *ring)
{
	int rc = io_uring_submit_and_get_events(&ring->uring);

	if (rc == -EINTR || rc == -EAGAIN || rc == -EBUSY)
		return 0; /* `issued` stays set, so dmb_ring_poll tries again */
	/* short of memory, the kernel takes some of the requests and reports no error */
	ring->issued = io_uring_sq_ready(&ring->uring) > 0;
	return rc < 0 ? rc : 0;
}

static struct dmb_io *uring_reap(struct dmb_ring *ring)
{
	struct io_uring_cqe *cqe;

	while (io_uring_peek_cqe(&ring->uring, &cqe) == 0) {
		struct dmb_io *io = io_uring_cqe_get_data(cqe);

		if (io)
			io->result = io->nsid ? dmb_nvme_result(io, cqe->res) : cqe->res;
		io_uring_cqe_seen(&ring->uring, cqe);
		if (io) /* NULL for the completion of a cancel */
			return io;
	}
	return NULL;
}

static void uring_cancel(struct dmb_ring *ring, struct dmb_io *io)
{
	struct io_uring_sqe *sqe = next_sqe(ring);

	if (!sqe)
		return;
	ring->issued = true;
	io_uring_prep_cancel64(sqe, (uint64_t)(uintptr_t)io, 0);
	io_uring_sqe_set_data(sqe, NULL);
}

/* Update one slot with the extended update, which liburing does not provide yet. */
static int uring_register_dmabuf(struct dmb_ring *ring, unsigned slot, int dmabuf_fd, int target_fd)
{
	struct dmb_regbuf_desc desc = {.type = DMB_REGBUF_EMPTY};
	struct dmb_rsrc_update2 update = {
		.offset = slot,
		.flags = DMB_RSRC_UPDATE_EXTENDED,
		.data = (uint64_t)(uintptr_t)&desc,
		.nr = 1,
	};
	long rc;

	if (ring->info.buffer_table)
		return ring->info.buffer_table;
	if (dmabuf_fd >= 0) {
		desc.type = DMB_REGBUF_DMABUF;
		desc.dmabuf_fd = dmabuf_fd;
		desc.target_fd = target_fd;
	}
	rc = syscall(SYS_io_uring_register, ring->uring.ring_fd, DMB_REGISTER_BUFFERS_UPDATE,
		     &update, sizeof(update));
	if (rc < 0)
		return -errno;
	return rc == 1 ? 0 : -EIO;
}

static const struct dmb_backend_ops uring_ops = {
	.destroy = uring_destroy,
	.issue = uring_issue,
	.wait = uring_wait,
	.poll = uring_poll,
	.reap = uring_reap,
	.cancel = uring_cancel,
	.register_dmabuf = uring_register_dmabuf,
};

int dmb_uring_setup(struct io_uring *uring, unsigned entries, unsigned flags)
{
	const unsigned shared[] = {IORING_SETUP_COOP_TASKRUN, 0};
	/* TASKRUN_FLAG: a request for events runs 20 pieces of deferred work. If more is left, the
	   kernel sets the flag and liburing, in uring_reap, requests events again. */
	const unsigned owned[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
					  IORING_SETUP_TASKRUN_FLAG,
				  IORING_SETUP_COOP_TASKRUN, 0};
	const unsigned *tries = flags & DMB_RING_SINGLE_ISSUER ? owned : shared;
	const unsigned wide =
		flags & DMB_RING_PASSTHROUGH ? IORING_SETUP_SQE128 | IORING_SETUP_CQE32 : 0;
	int rc;

	for (;; tries++) {
		struct io_uring_params params = {
			.flags = *tries | IORING_SETUP_CLAMP | wide,
		};

		rc = io_uring_queue_init_params(entries, uring, &params);
		if (rc != -EINVAL || !*tries)
			return rc;
	}
}

/* Create an empty table of files. io_uring_register_files_sparse() is not used because it raises
   the process's RLIMIT_NOFILE if that is below the table's size; here the result is -EMFILE. */
static int create_file_table(struct io_uring *uring)
{
	struct io_uring_rsrc_register table = {
		.nr = DMB_FILE_SLOTS,
		.flags = IORING_RSRC_REGISTER_SPARSE,
	};
	long rc = syscall(SYS_io_uring_register, uring->ring_fd, IORING_REGISTER_FILES2, &table,
			  sizeof(table));

	return rc < 0 ? -errno : 0;
}

static int uring_init(struct dmb_ring *ring, unsigned depth, unsigned flags)
{
	int rc = dmb_uring_setup(&ring->uring, depth, flags);

	if (rc)
		return rc;
	ring->ops = &uring_ops;
	ring->info.setup_flags = ring->uring.flags;
	if (!(ring->uring.features & IORING_FEAT_EXT_ARG)) {
		io_uring_queue_exit(&ring->uring);
		return -ENOSYS; /* Linux before 5.11: a wait with a timeout needs it */
	}
	ring->info.buffer_table =
		io_uring_register_buffers_sparse(&ring->uring, DMB_PROBE_SLOT + 1);
	ring->info.file_table = create_file_table(&ring->uring);
	return 0;
}

int dmb_ring_create(int backend, unsigned depth, unsigned flags, struct dmb_ring **ret)
{
	struct dmb_ring *ring = calloc(1, sizeof(*ring));
	int rc;

	if (!ring)
		return -ENOMEM;
	ring->info.backend = backend;
	ring->info.depth = depth;
	ring->eventfd = -1;
	if (backend == DMB_BACKEND_THREADS) {
		ring->info.buffer_table = ring->info.file_table = -EOPNOTSUPP;
		rc = dmb_threads_init(ring);
	} else {
		rc = uring_init(ring, depth, flags);
	}
	if (rc) {
		free(ring);
		return rc;
	}
	dmb_testing_wrap(ring);
	*ret = ring;
	return 0;
}

void dmb_ring_destroy(struct dmb_ring *ring)
{
	if (!ring)
		return;
	ring->ops->destroy(ring);
	dmb_stage_release(&ring->stage);
	free(ring);
}

void dmb_ring_get_info(const struct dmb_ring *ring, struct dmb_ring_info *ret)
{
	*ret = ring->info;
}

int dmb_ring_register_buffer(struct dmb_ring *ring, unsigned slot, uint64_t address, uint64_t size)
{
	struct iovec iov = {.iov_base = size ? (void *)(uintptr_t)address : NULL, .iov_len = size};
	__u64 tag = 0;
	int rc;

	if (slot >= DMB_BUFFER_SLOTS)
		return -EINVAL;
	if (ring->info.buffer_table)
		return ring->info.buffer_table;
	rc = io_uring_register_buffers_update_tag(&ring->uring, slot, &iov, &tag, 1);
	return rc < 0 ? rc : 0;
}

int dmb_ring_probe_native(struct dmb_ring *ring)
{
	return ring->ops->register_dmabuf(ring, DMB_PROBE_SLOT, -1, -1);
}

int dmb_ring_register_dmabuf(struct dmb_ring *ring, unsigned slot, int dmabuf_fd, int target_fd)
{
	if (slot >= DMB_BUFFER_SLOTS)
		return -EINVAL;
	return ring->ops->register_dmabuf(ring, slot, dmabuf_fd, target_fd);
}

void dmb_ring_run_deferred(struct dmb_ring *ring)
{
	if (!ring->threads)
		io_uring_get_events(&ring->uring);
}

int dmb_ring_register_file(struct dmb_ring *ring, unsigned slot, int fd)
{
	int rc;

	if (ring->info.file_table)
		return ring->info.file_table;
	rc = io_uring_register_files_update(&ring->uring, slot, &fd, 1);
	return rc < 0 ? rc : 0;
}

int dmb_uring_probe(void)
{
	struct io_uring uring;
	struct io_uring_params params = {0};
	int rc = io_uring_queue_init_params(1, &uring, &params);

	if (rc)
		return rc;
	io_uring_queue_exit(&uring);
	return params.features & IORING_FEAT_EXT_ARG ? 0 : -ENOSYS;
}
