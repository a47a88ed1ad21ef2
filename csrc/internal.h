/* SPDX-License-Identifier: MIT */
/* Declarations that the files of the core share and its callers do not use. */
#ifndef DMABUF_INTERNAL_H
#define DMABUF_INTERNAL_H

#include <fcntl.h>
#include <liburing.h>
#include <stdbool.h>
#include <sys/types.h>

#include "core.h"

struct dmb_nvme_cmd;

/* Flags of sync_file_range(2) to write all dirty pages and wait until they are written. */
#define DMB_FLUSH_FLAGS                                                                            \
	(SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER)

/* The queue entry of a batch that an event loop drives, in at most one queue. */
struct dmb_entry {
	struct dmb_entry *next, *prev;
	struct dmb_queue *in;
	struct dmb_batch *batch;
	uint64_t tag;
	bool started;
};

struct dmb_queue {
	struct dmb_entry *first, *last;
};

enum dmb_kind {
	DMB_MOVE,
	DMB_FLUSH, /* sync_file_range(2) of the edges */
	DMB_PAUSE, /* a timeout of DMB_PAUSE_NS, which completes with an error */
};
#define DMB_PAUSE_NS 1000000

/* One request to the kernel, and the part of a segment that it moves. */
struct dmb_io {
	struct dmb_io *next;
	struct dmb_batch *batch;

	/* the part of the segment */
	size_t segment;
	uint64_t skip;	   /* bytes of the segment before the part */
	uint64_t position; /* bytes of all segments before the part */
	uint64_t left;	   /* bytes to move, of which this request moves `want` */
	uint64_t want;

	/* the request */
	int32_t direction;
	bool straight;
	int fd;
	int file_slot;
	int buffer_slot;
	enum dmb_kind kind;
	bool async;  /* submission could block: pass it to a kernel worker thread */
	bool native; /* address is an offset into the slot's dma-buf */
	bool staged; /* goes through `block`, and address points there */
	bool hole; /* the file has no bytes there: the CPU writes zeros, the device does nothing */
	uint8_t *address;
	uint32_t length;
	uint64_t offset;
	uint8_t *block;	 /* the staging block, or NULL */
	uint8_t *memory; /* the buffer's memory that the block is copied from or to */
	uint32_t lead;	 /* bytes at the block's start that are not part of the segment */
	uint32_t nsid;	 /* the job's nsid */
	uint32_t lba_shift;

	bool busy; /* in use: may be in flight */
	uint32_t reissues;
	int32_t result;
	int32_t status; /* the NVMe status behind the result, or 0 */
};

/* A buffer slot that no request uses: updating it is a probe without side effects. */
#define DMB_PROBE_SLOT DMB_BUFFER_SLOTS

struct dmb_backend_ops {
	void (*destroy)(struct dmb_ring *ring);
	/* Queue a request, which may start at once or at the next wait. Returns 0 or -errno. */
	int (*issue)(struct dmb_ring *ring, struct dmb_io *io);
	/* Start queued requests; return after a completion, a timeout or a signal. */
	int (*wait)(struct dmb_ring *ring, int timeout_ms);
	/* Start queued requests and collect completions, without waiting. */
	int (*poll)(struct dmb_ring *ring);
	/* Return the next completed request, with its result set, or NULL. */
	struct dmb_io *(*reap)(struct dmb_ring *ring);
	/* Try to cancel a request. It still completes, with -ECANCELED if it was cancelled. */
	void (*cancel)(struct dmb_ring *ring, struct dmb_io *io);
	/* Implement dmb_ring_register_dmabuf, also for DMB_PROBE_SLOT. */
	int (*register_dmabuf)(struct dmb_ring *ring, unsigned slot, int dmabuf_fd, int target_fd);
};

/* A pool of page-aligned blocks for bytes that the device cannot move to or from the buffer. */
struct dmb_stage {
	uint8_t *memory;
	size_t size;
	size_t block;
	uint32_t count;
	uint32_t free_count;
	uint32_t *free;
};

struct dmb_ring {
	const struct dmb_backend_ops *ops;
	struct dmb_ring_info info;
	struct io_uring uring;
	struct dmb_threads *threads;
	struct dmb_stage stage;	   /* memory of a finished batch, for the next one */
	int eventfd;		   /* of the event loop that drives the ring, or -1 */
	bool issued;		   /* something was issued since the last poll */
	uint32_t in_flight;	   /* requests of all batches */
	uint32_t ready;		   /* completions available after the last wait */
	struct dmb_queue runnable; /* batches with completions to act on */
	struct dmb_queue waiting;  /* batches that wait until they may submit */
	struct dmb_queue done;	   /* finished batches, not reported yet */
#ifdef DMB_TESTING
	struct dmb_testing *testing; /* tests/testing.c */
#endif
};

enum dmb_step { DMB_STEP_DONE, DMB_STEP_IN_FLIGHT, DMB_STEP_OVER_QUOTA };
/* Return the bytes that a batch moved without a gap, once it is done; 0 before. */
uint64_t dmb_batch_nbytes(const struct dmb_batch *batch);
/* Advance a batch by at most `quota` new requests. */
enum dmb_step dmb_batch_step(struct dmb_batch *batch, uint32_t quota);
/* Handle at most `most` completions of the ring; return whether there was one. */
bool dmb_reap(struct dmb_ring *ring, uint32_t most);

/* Enqueue a new batch. */
void dmb_queue_start(struct dmb_ring *ring, struct dmb_entry *entry, uint64_t tag);
/* Mark a batch runnable after a completion. */
void dmb_queue_completed(struct dmb_ring *ring, struct dmb_entry *entry);
/* Make a batch that was stopped runnable before the waiting ones. */
void dmb_queue_promote(struct dmb_ring *ring, struct dmb_entry *entry);
void dmb_queue_remove(struct dmb_entry *entry);

/* Create an io_uring with the best flags that the kernel supports for DMB_RING_ flags. */
int dmb_uring_setup(struct io_uring *uring, unsigned entries, unsigned flags);
int dmb_threads_init(struct dmb_ring *ring);

/* Copy a staged request's bytes from the buffer into its block, or `moved` bytes out of it. */
void dmb_fill_block(struct dmb_io *io);
void dmb_empty_block(struct dmb_io *io, uint64_t moved);

uint64_t dmb_page(void);
/* Return the size of a transparent huge page. */
uint64_t dmb_huge_page(void);

/* Call pread(2) or pwrite(2) once. Returns a count or -errno. */
int64_t dmb_read_write(int direction, int fd, uint64_t address, uint64_t size, uint64_t offset);
/* Return whether the job may access the dma-bufs of [start, end) now: poll(2) without waiting. */
bool dmb_fences_signalled(const struct dmb_job *job, uint64_t start, uint64_t end);

/* Return whether one request can move a range: small, aligned, and not used by a device. */
bool dmb_is_small(const struct dmb_job *job, uint64_t offset, uint64_t start, uint64_t size,
		  bool fence);

/* Fill in the NVMe command of a request with a nsid and a length that is not 0. */
void dmb_nvme_command(const struct dmb_io *io, struct dmb_nvme_cmd *ret);
/* Convert a command's result (0, a status or -errno) to a count or -errno, and store the status. */
int32_t dmb_nvme_result(struct dmb_io *io, int answer);
/* Run the command by ioctl(2). Returns a count or -errno. */
int32_t dmb_nvme_execute(struct dmb_io *io);

/*
 * Make a pool of `count` blocks of `block` bytes; reuse its memory if that is large enough. All
 * blocks must be free. After an error the pool is empty. `large`: use huge pages if possible.
 */
int dmb_stage_reserve(struct dmb_stage *stage, uint32_t count, size_t block, bool large);
void dmb_stage_release(struct dmb_stage *stage);
uint8_t *dmb_stage_take(struct dmb_stage *stage);
void dmb_stage_give(struct dmb_stage *stage, uint8_t *block);

/*
 * Cut the next request out of io's `left` bytes at (segment, skip). Sets io->staged and leaves the
 * address NULL if the bytes need a staging block.
 */
void dmb_cut_request(const struct dmb_job *job, const uint64_t *segments, struct dmb_io *io,
		     bool edge);

/* Compute the part of a segment that the first pass moves: bytes [*start, *end) of it. */
void dmb_middle(const struct dmb_job *job, const uint64_t *segment, uint64_t *start, uint64_t *end);

/* Return how many bytes the device can move to or from the buffer itself, after *staged others. */
uint64_t dmb_straight_bytes(const struct dmb_job *job, const uint64_t *segment,
			    const struct dmb_io *io, uint64_t *staged);

/* Return the address of byte `skip` of a segment in the buffer. */
static inline uint8_t *dmb_address(const struct dmb_job *job, const uint64_t *segment,
				   uint64_t skip)
{
	return (uint8_t *)(uintptr_t)(job->base + segment[1] + skip);
}

static inline uint64_t dmb_min(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t dmb_max(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

static inline uint64_t dmb_align_down(uint64_t value, uint64_t align)
{
	return value & ~(align - 1);
}

static inline uint64_t dmb_align_up(uint64_t value, uint64_t align)
{
	return dmb_align_down(value + align - 1, align);
}

#endif
