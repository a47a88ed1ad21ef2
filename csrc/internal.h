/* SPDX-License-Identifier: MIT */
/* What ring.c, threads.c, batch.c and stage.c share. */
#ifndef DMABUF_INTERNAL_H
#define DMABUF_INTERNAL_H

#include <fcntl.h>
#include <liburing.h>
#include <stdbool.h>
#include <sys/types.h>

#include "core.h"

struct dmb_nvme_cmd;

/* Of sync_file_range(2): all that is dirty, written out when it returns. */
#define DMB_FLUSH_FLAGS                                                                            \
	(SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER)

/* A batch's place among those that an event loop drives: in one list at most. */
struct dmb_turn {
	struct dmb_turn *next, *prev;
	struct dmb_turns *in;
	struct dmb_batch *batch;
	uint64_t tag;
	bool started;
	bool own; /* the batch is destroyed once it is told that it is done */
	struct dmb_turn *next_own, *prev_own;
};

struct dmb_turns {
	struct dmb_turn *first, *last;
};

enum dmb_kind {
	DMB_MOVE,
	DMB_FLUSH, /* sync_file_range(2) of the edges: no bytes are moved */
	DMB_PAUSE, /* nothing for DMB_PAUSE_NS; completes with an error */
};
#define DMB_PAUSE_NS 1000000

/* One request: what is asked of the kernel, and which bytes of which segment it is for. */
struct dmb_io {
	struct dmb_io *next;
	struct dmb_batch *batch;

	/* the bytes wanted */
	size_t segment;
	uint64_t skip;	   /* bytes of the segment before them */
	uint64_t position; /* bytes of all segments before them */
	uint64_t left;	   /* bytes to move, of which this request moves `want` */
	uint64_t want;

	/* the request */
	int32_t direction;
	bool straight;
	int fd;
	int file_slot;
	int buffer_slot;
	enum dmb_kind kind;
	bool heavy;  /* may take long to start: for a thread of the kernel's */
	bool native; /* address is an offset into the slot's dma-buf */
	bool staged; /* goes through `block`, which is where address points */
	uint8_t *address;
	uint32_t length;
	uint64_t offset;
	uint8_t *block;	 /* the staging block, or NULL */
	uint8_t *memory; /* where its bytes come from, or go to */
	uint32_t lead;	 /* bytes at the block's start that nobody wants */
	uint32_t nsid;	 /* as in the job */
	uint32_t lba_shift;

	bool busy;     /* taken by a batch: perhaps in flight */
	int64_t began; /* when, where the job wants latencies */
	uint32_t reissues;
	int32_t result;
	int32_t status; /* the NVMe status behind the result, or 0 */
};

struct dmb_backend_ops {
	void (*destroy)(struct dmb_ring *ring);
	/* Take a request; it may start at once or at the next wait. 0 or -errno. */
	int (*issue)(struct dmb_ring *ring, struct dmb_io *io);
	/* Start what was taken; return when `count` of it are complete (some backends: when one
	   is), the time is up, or a signal came. */
	int (*wait)(struct dmb_ring *ring, uint32_t count, int timeout_ms);
	/* Start what was taken, and see what completed; no wait. */
	int (*poll)(struct dmb_ring *ring);
	/* The next completed request with its result, or NULL. */
	struct dmb_io *(*reap)(struct dmb_ring *ring);
	/* Ask that a request not run; it completes all the same, perhaps with ECANCELED. */
	void (*cancel)(struct dmb_ring *ring, struct dmb_io *io);
};

/* Page-aligned blocks for bytes that cannot go straight. */
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
	struct dmb_emulated *emulated;
	struct dmb_stage stage;	  /* what the last batch left for the next */
	int eventfd;		  /* of the loop that drives it, or -1 */
	bool issued;		  /* something was issued since the last poll */
	uint32_t in_flight;	  /* requests, of all batches */
	uint32_t ready;		  /* of them, those that were complete after the last wait */
	struct dmb_turns touched; /* batches with completions since their last turn */
	struct dmb_turns waiting; /* for room among the requests in flight */
	struct dmb_turns done;	  /* whose tags were not told yet */
	struct dmb_turn *own;	  /* lone requests that were not told yet */
	dmb_filter filter;
	void *filter_arg;
};

/* A step of a batch: make at most `quota` requests, and go through the phases. */
enum dmb_step { DMB_STEP_DONE, DMB_STEP_FLYING, DMB_STEP_WANTS_ROOM };
enum dmb_step dmb_batch_step(struct dmb_batch *batch, uint32_t quota);
/* Handle what completed, of all the ring's batches, at most `most` requests; false for none. */
bool dmb_reap(struct dmb_ring *ring, uint32_t most);

void dmb_turn_begin(struct dmb_ring *ring, struct dmb_turn *turn, uint64_t tag);
/* One of its requests completed. */
void dmb_turn_touch(struct dmb_ring *ring, struct dmb_turn *turn);
/* It is to end: its next turn comes first. */
void dmb_turn_hurry(struct dmb_ring *ring, struct dmb_turn *turn);
void dmb_turn_leave(struct dmb_turn *turn);
/* The ring has the batch from here on, until that is destroyed. */
void dmb_turn_own(struct dmb_ring *ring, struct dmb_turn *turn);
void dmb_turn_disown(struct dmb_ring *ring, struct dmb_turn *turn);

int dmb_threads_init(struct dmb_ring *ring);

/*
 * DMB_RING_EMULATE_NATIVE, so that tests have the route on kernels without it: dma-bufs are mapped,
 * and the answers are those that the kernel with the series gives.
 */
int dmb_emulate_create(struct dmb_emulated **ret);
void dmb_emulate_destroy(struct dmb_emulated *emulated);
int dmb_emulate_register(struct dmb_emulated *emulated, unsigned slot, int dmabuf_fd,
			 int target_fd);
/* A native request: a count or -errno. */
int32_t dmb_emulate_execute(struct dmb_emulated *emulated, const struct dmb_io *io);

/* A staged request's bytes, from the buffer into its block, and what was `moved` out of it. */
void dmb_fill_block(struct dmb_io *io);
void dmb_empty_block(struct dmb_io *io, uint64_t moved);

uint64_t dmb_page(void);
/*
 * Drop the pages of [*at, end) from a file's page cache, and see that each is gone. Where one is
 * not, returns false, and *at is its offset. Both are multiples of a page.
 */
bool dmb_drop_range(int fd, uint64_t *at, uint64_t end);
/* Bytes of a transparent huge page. */
uint64_t dmb_huge_page(void);

/* One pread(2) or pwrite(2). Returns a count or -errno. */
int64_t dmb_lone(int direction, int fd, uint64_t address, uint64_t size, uint64_t offset);
/* Whether a lane moves such a request: see dmb_lane_move. */
bool dmb_lane_takes(const struct dmb_lane *lane, uint64_t offset, uint64_t start, uint64_t size,
		    bool fence);

/* The NVMe command of a request that has a nsid; its length is not 0. */
void dmb_nvme_command(const struct dmb_io *io, struct dmb_nvme_cmd *ret);
/* A count or -errno from a command's answer: 0, a status, or -errno. Sets the request's status. */
int32_t dmb_nvme_result(struct dmb_io *io, int answer);
/* The command by ioctl(2): a count or -errno. */
int32_t dmb_nvme_execute(struct dmb_io *io);

/*
 * `count` blocks of `block` bytes, in the memory that is there where it is enough. All blocks must
 * be free; after an error there is none. `large`: all will be used, and huge pages are worth it.
 */
int dmb_stage_reserve(struct dmb_stage *stage, uint32_t count, size_t block, bool large);
void dmb_stage_release(struct dmb_stage *stage);
uint8_t *dmb_stage_take(struct dmb_stage *stage);
void dmb_stage_give(struct dmb_stage *stage, uint8_t *block);

/*
 * Cut the next request out of io's `left` bytes at (segment, skip). Sets io->staged, and no
 * address, where the bytes have to go through a staging block.
 */
void dmb_shape(const struct dmb_job *job, const uint64_t *segments, struct dmb_io *io, bool edge);

/* The part of a segment that goes in the first pass: [*start, *end), in bytes of the segment. */
void dmb_middle(const struct dmb_job *job, const uint64_t *segment, uint64_t *start, uint64_t *end);

/* The buffer's address of a byte of a segment. */
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
