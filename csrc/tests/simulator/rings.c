/* SPDX-License-Identifier: MIT */
/* Virtual io_uring: the functions of liburing that the core calls, on the virtual kernel. */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../uapi.h"
#include "rings.h"

enum {
	RINGS = 16,
	RING_FD = 200000,
	ENTRIES = 64,
	PENDING = 2048,
	BUFFERS = 4097,
	FILES = 512,
	WAITS = 100000, /* of an episode that goes on for ever */
};

void *__real_calloc(size_t count, size_t size);
void __real_free(void *memory);
void *__real_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
int __real_eventfd_write(int fd, eventfd_t value);

struct completion {
	uint64_t user_data;
	int32_t result;
};

struct virtual_ring {
	bool used, deferred;
	unsigned sq_head, sq_tail, sq_flags, cq_head, cq_tail, mask_sq, mask_cq;
	unsigned entries, shift;
	int eventfd;
	uint8_t *sqes, *cqes;
	unsigned first, pending; /* completions without a place in the queue yet */
	struct completion waiting[PENDING];
	struct slot *slots[BUFFERS];
	int files[FILES];
};

static struct virtual_ring *rings[RINGS];

static struct virtual_ring *ring_of(const struct io_uring *uring)
{
	return rings[uring->ring_fd - RING_FD];
}

static unsigned queued(const struct virtual_ring *ring)
{
	return ring->cq_tail - ring->cq_head;
}

/* Give completions their place in the queue. */
static void post(struct virtual_ring *ring, unsigned most)
{
	while (most-- && ring->pending && queued(ring) < 2 * ring->entries) {
		struct completion *next = &ring->waiting[ring->first++ % PENDING];
		unsigned at = (ring->cq_tail & ring->mask_cq) << (ring->shift & 1);
		struct io_uring_cqe *cqe =
			(struct io_uring_cqe *)(ring->cqes + at * sizeof(struct io_uring_cqe));

		*cqe = (struct io_uring_cqe){.user_data = next->user_data, .res = next->result};
		ring->cq_tail++;
		ring->pending--;
	}
	ring->sq_flags = ring->pending ? IORING_SQ_TASKRUN : 0;
}

static void complete(struct virtual_ring *ring, uint64_t user_data, int64_t result)
{
	if (ring->pending == PENDING)
		broken("%d completions that nobody fetched", PENDING);
	ring->waiting[(ring->first + ring->pending++) % PENDING] =
		(struct completion){user_data, (int32_t)result};
	if (!ring->deferred)
		post(ring, UINT32_MAX);
	else
		ring->sq_flags = IORING_SQ_TASKRUN;
	if (ring->eventfd == EVENT_FD)
		world.signals++;
	else if (ring->eventfd >= 0)
		__real_eventfd_write(ring->eventfd, 1);
}

void request_done(struct request *request, int64_t result)
{
	if (request->ring)
		complete(request->ring, request->user_data, result);
	else
		synchronous_done(result);
}

/* -- setting up */

int io_uring_queue_init_params(unsigned entries, struct io_uring *uring,
			       struct io_uring_params *params)
{
	struct virtual_ring *ring;
	unsigned index = 0, size = 1;

	while (index < RINGS && rings[index])
		index++;
	if (index == RINGS)
		return -EMFILE;
	if (chance(world.failing ? world.faults.memory : 0))
		return -ENOMEM;
	while (size < entries)
		size *= 2;
	rings[index] = ring = __real_calloc(1, sizeof(*ring));
	ring->entries = size;
	ring->deferred = params->flags & IORING_SETUP_DEFER_TASKRUN;
	ring->shift = !!(params->flags & IORING_SETUP_SQE128);
	ring->mask_sq = size - 1;
	ring->mask_cq = 2 * size - 1;
	ring->eventfd = -1;
	memset(ring->files, -1, sizeof(ring->files));
	ring->sqes = __real_calloc(size << ring->shift, sizeof(struct io_uring_sqe));
	ring->cqes = __real_calloc(2 * size << ring->shift, sizeof(struct io_uring_cqe));
	memset(uring, 0, sizeof(*uring));
	uring->ring_fd = RING_FD + (int)index;
	uring->enter_ring_fd = uring->ring_fd;
	uring->flags = params->flags;
	uring->features = params->features = IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP;
	uring->sq = (struct io_uring_sq){
		.khead = &ring->sq_head,
		.ktail = &ring->sq_tail,
		.kflags = &ring->sq_flags,
		.sqes = (struct io_uring_sqe *)ring->sqes,
		.kring_mask = &ring->mask_sq,
		.kring_entries = &ring->entries,
		.ring_mask = ring->mask_sq,
		.ring_entries = size,
	};
	uring->cq = (struct io_uring_cq){
		.khead = &ring->cq_head,
		.ktail = &ring->cq_tail,
		.cqes = (struct io_uring_cqe *)ring->cqes,
		.kring_mask = &ring->mask_cq,
		.ring_mask = ring->mask_cq,
		.ring_entries = 2 * size,
	};
	return 0;
}

/* Requests that are in flight go on: the kernel cancels them, and the device is not asked. */
void io_uring_queue_exit(struct io_uring *uring)
{
	struct virtual_ring *ring = ring_of(uring);

	if (in_flight())
		broken("a ring is destroyed with %u requests in flight", in_flight());
	for (unsigned i = 0; i < BUFFERS; i++)
		slot_put(ring->slots[i]);
	rings[uring->ring_fd - RING_FD] = NULL;
	__real_free(ring->sqes);
	__real_free(ring->cqes);
	__real_free(ring);
}

int io_uring_register_buffers_sparse(struct io_uring *uring, unsigned count)
{
	(void)uring;
	return count <= BUFFERS ? 0 : -EINVAL;
}

static int fill_slot(struct virtual_ring *ring, unsigned index, const struct slot *with)
{
	struct slot *slot = NULL;

	if (chance(world.failing ? world.faults.memory : 0))
		return -ENOMEM;
	if (with) {
		slot = __real_calloc(1, sizeof(*slot));
		*slot = *with;
		slot->users = 1;
		slot->resets = world.resets;
	}
	slot_put(ring->slots[index]);
	ring->slots[index] = slot;
	return 1;
}

int io_uring_register_buffers_update_tag(struct io_uring *uring, unsigned index,
					 const struct iovec *iovecs, const __u64 *tags,
					 unsigned count)
{
	const struct slot with = {
		.memory = iovecs->iov_base, .size = iovecs->iov_len, .target = -1};

	(void)tags;
	(void)count;
	return fill_slot(ring_of(uring), index, iovecs->iov_base ? &with : NULL);
}

static long register_dmabuf(struct virtual_ring *ring, const struct dmb_rsrc_update2 *update)
{
	const struct dmb_regbuf_desc *desc = (const void *)(uintptr_t)update->data;
	struct slot with = {.target = desc->target_fd};
	int slab = desc->dmabuf_fd - SLAB_FD, rc;

	if (desc->type == DMB_REGBUF_EMPTY) {
		if (ring->slots[update->offset]) /* else a probe */
			check_wait();
		return fill_slot(ring, update->offset, NULL);
	}
	if (slab >= 0 && slab < SLABS) {
		with.memory = world.slabs[slab];
		with.size = world.slab_sizes[slab];
	} else {
		with.size = (uint64_t)lseek(desc->dmabuf_fd, 0, SEEK_END);
		with.memory = __real_mmap(NULL, with.size, PROT_READ | PROT_WRITE, MAP_SHARED,
					  desc->dmabuf_fd, 0);
		with.mapped = true;
		if (with.memory == MAP_FAILED)
			return -errno;
	}
	rc = fill_slot(ring, update->offset, &with);
	if (rc < 0 && with.mapped)
		munmap(with.memory, with.size);
	return rc;
}

long ring_register(int fd, unsigned opcode, void *argument)
{
	if (opcode == DMB_REGISTER_BUFFERS_UPDATE)
		return register_dmabuf(rings[fd - RING_FD], argument);
	return 0; /* IORING_REGISTER_FILES2 */
}

int io_uring_register_files_update(struct io_uring *uring, unsigned offset, const int *files,
				   unsigned count)
{
	(void)count;
	ring_of(uring)->files[offset] = *files;
	return 1;
}

int io_uring_register_eventfd(struct io_uring *uring, int fd)
{
	ring_of(uring)->eventfd = fd;
	return 0;
}

int io_uring_unregister_eventfd(struct io_uring *uring)
{
	ring_of(uring)->eventfd = -1;
	return 0;
}

/* -- requests */

static void cancel(struct virtual_ring *ring, const struct io_uring_sqe *sqe)
{
	int rc = request_cancel(sqe->addr);

	happened("cancel", sqe->addr != 0, 0, (uint64_t)rc);
	complete(ring, sqe->user_data, rc);
}

static int find_memory(struct request *request, struct virtual_ring *ring, unsigned index,
		       uint64_t address)
{
	struct slot *slot = index < BUFFERS ? ring->slots[index] : NULL;
	uint64_t base;

	if (!slot)
		return -EFAULT;
	slot->users++;
	request->slot = slot;
	base = slot->target >= 0 ? 0 : (uintptr_t)slot->memory;
	if (address < base || address - base > slot->size ||
	    request->length > slot->size - (address - base))
		return -EFAULT;
	request->memory = slot->memory + (address - base);
	return 0;
}

static void start_command(struct request *request, struct virtual_ring *ring,
			  const struct io_uring_sqe *sqe)
{
	struct dmb_nvme_cmd command;

	memcpy(&command, (const uint8_t *)sqe + offsetof(struct io_uring_sqe, cmd),
	       sizeof(command));
	request->passthrough = request->direct = true;
	request->write = command.opcode == 1;
	request->offset = ((uint64_t)command.cdw11 << 32 | command.cdw10) * world.file.block;
	request->length = command.data_len;
	request->memory = (uint8_t *)(uintptr_t)command.addr;
	if ((command.cdw12 + 1) * world.file.block != command.data_len)
		broken("an NVMe command of %u blocks and %u bytes", command.cdw12 + 1,
		       command.data_len);
	if (sqe->uring_cmd_flags & IORING_URING_CMD_FIXED)
		request->error = find_memory(request, ring, sqe->buf_index, command.addr);
}

static void start(struct virtual_ring *ring, const struct io_uring_sqe *sqe)
{
	struct request *request;
	bool fixed = sqe->opcode == IORING_OP_READ_FIXED || sqe->opcode == IORING_OP_WRITE_FIXED;

	if (sqe->opcode == IORING_OP_ASYNC_CANCEL) {
		cancel(ring, sqe);
		return;
	}
	if (sqe->opcode == IORING_OP_NOP) {
		complete(ring, sqe->user_data, 0);
		return;
	}
	request = request_new();
	request->ring = ring;
	request->user_data = sqe->user_data;
	request->fd = sqe->flags & IOSQE_FIXED_FILE ? ring->files[sqe->fd] : sqe->fd;
	request->offset = sqe->off;
	request->length = sqe->len;
	request->memory = (uint8_t *)(uintptr_t)sqe->addr;
	request->write = sqe->opcode == IORING_OP_WRITE || sqe->opcode == IORING_OP_WRITE_FIXED;
	request->direct = is_direct(request->fd);
	if (sqe->opcode == IORING_OP_TIMEOUT) {
		const struct __kernel_timespec *time = (const void *)(uintptr_t)sqe->addr;

		request->pause = true;
		request->length = (uint64_t)time->tv_sec * 1000000000 + (uint64_t)time->tv_nsec;
	} else if (sqe->opcode == IORING_OP_SYNC_FILE_RANGE) {
		request->flush = true;
	} else if (sqe->opcode == IORING_OP_URING_CMD) {
		start_command(request, ring, sqe);
	} else if (fixed) {
		request->error = find_memory(request, ring, sqe->buf_index, sqe->addr);
	} else if (sqe->opcode != IORING_OP_READ && sqe->opcode != IORING_OP_WRITE) {
		broken("operation %u", sqe->opcode);
	}
	request_start(request);
}

/* Take the requests of the queue; return how many, or -errno. */
static int consume(struct io_uring *uring)
{
	struct virtual_ring *ring = ring_of(uring);
	unsigned left = uring->sq.sqe_tail - ring->sq_head, taken = 0;
	int failure = 0;

	time_passes(1000);
	if (left && world.failing && chance(world.faults.submit)) {
		static const int errors[] = {EAGAIN, EBUSY, EINTR};

		left = (unsigned)choose(left);
		failure = -errors[choose(3)];
	}
	for (; taken < left; taken++) {
		unsigned at = (ring->sq_head & ring->mask_sq) << ring->shift;

		start(ring, &uring->sq.sqes[at]);
		ring->sq_head++;
	}
	uring->sq.sqe_head = ring->sq_head;
	return taken || !failure ? (int)taken : failure;
}

int io_uring_submit(struct io_uring *uring)
{
	return consume(uring);
}

static int wait_for_one(struct virtual_ring *ring, const struct __kernel_timespec *time)
{
	uint64_t deadline =
		now_ns() + (uint64_t)time->tv_sec * 1000000000 + (uint64_t)time->tv_nsec;

	if (world.waits++ == WAITS)
		broken("a transfer that does not end");
	post(ring, UINT32_MAX);
	if (!queued(ring) && world.failing && chance(world.faults.interrupt))
		return -EINTR;
	while (!queued(ring)) {
		if (!event_until(deadline))
			return -ETIME;
		post(ring, UINT32_MAX);
	}
	return 0;
}

int io_uring_submit_and_wait_timeout(struct io_uring *uring, struct io_uring_cqe **ret,
				     unsigned count, struct __kernel_timespec *time,
				     sigset_t *signals)
{
	int taken = consume(uring), rc;

	(void)ret;
	(void)count;
	(void)signals;
	if (taken < 0)
		return taken;
	rc = wait_for_one(ring_of(uring), time);
	return taken ? taken : rc;
}

int io_uring_wait_cqe_timeout(struct io_uring *uring, struct io_uring_cqe **ret,
			      struct __kernel_timespec *time)
{
	(void)ret;
	return wait_for_one(ring_of(uring), time);
}

/* Deferred work runs 20 pieces at a time. */
int io_uring_ring_dontfork(struct io_uring *uring)
{
	(void)uring;
	return 0;
}

int io_uring_get_events(struct io_uring *uring)
{
	post(ring_of(uring), 20);
	return 0;
}

int io_uring_submit_and_get_events(struct io_uring *uring)
{
	struct virtual_ring *ring = ring_of(uring);
	int taken = consume(uring);

	if (world.waits++ == WAITS)
		broken("transfers that do not end");
	if (ring->eventfd >= 0 && ring->eventfd != EVENT_FD) { /* an event loop of Python */
		next_event();
		if (in_flight())
			__real_eventfd_write(ring->eventfd, 1);
	}
	post(ring, 20);
	return taken;
}

int __io_uring_get_cqe(struct io_uring *uring, struct io_uring_cqe **ret, unsigned submit,
		       unsigned wait, sigset_t *signals)
{
	struct virtual_ring *ring = ring_of(uring);

	(void)submit;
	(void)wait;
	(void)signals;
	post(ring, 20);
	*ret = NULL;
	if (!queued(ring))
		return -EAGAIN;
	*ret = (struct io_uring_cqe *)(ring->cqes +
				       ((ring->cq_head & ring->mask_cq) << ring->shift) *
					       sizeof(struct io_uring_cqe));
	return 0;
}
