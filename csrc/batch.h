/* SPDX-License-Identifier: MIT */
/* The batch, shared by batch.c, bisect.c, cache.c and pacing.c. */
#ifndef DMABUF_BATCH_H
#define DMABUF_BATCH_H

#include "internal.h"

enum phase { MIDDLE, BISECT, DROP, EDGES, FLUSH, DONE };

struct dmb_batch {
	struct dmb_ring *ring;
	struct dmb_entry entry;
	struct dmb_job job;
	uint64_t own_segment[3]; /* the copy of a single segment */
	const uint64_t *segments;
	size_t count;
	uint64_t total;

	enum phase phase;
	bool stopping;

	/* the cursor of the present pass: a segment, bytes of all before it, bytes of it */
	size_t segment;
	uint64_t before;
	uint64_t skip;

	/* positions in all segments; UINT64_MAX for none */
	uint64_t middle_end;  /* first byte that the first pass did not issue */
	uint64_t first_edge;  /* first byte left for the second pass */
	uint64_t stop;	      /* first byte that could not be moved */
	uint64_t alone_until; /* requests before it are issued one at a time */

	struct dmb_io failed; /* the failed request with the lowest position; error 0 for none */
	int error;

	/* positions while BISECT looks for the bad block */
	uint64_t bad_position, bad_end, bad_skip;
	uint64_t tried_end;
	int bad_error;

	uint64_t edge_start, edge_end; /* the part of the file that edges were written to */
	uint64_t flush_from;	       /* position of the first edge: what a failed flush loses */
	uint32_t pauses;	       /* pauses so far, while pages cannot be dropped */

	struct dmb_stage stage; /* empty until a request needs a block */
	uint32_t in_flight;
	struct dmb_io *ios;
	struct dmb_io *free;
	struct dmb_result result;
};

/* -- batch.c: requests */

/* Take a free request for `left` bytes at a position; issue it or give it back. */
struct dmb_io *dmb_take_io(struct dmb_batch *batch, size_t segment, uint64_t skip,
			   uint64_t position, uint64_t left);
void dmb_give_io(struct dmb_batch *batch, struct dmb_io *io);
/* Cut and issue one request; on failure, record the error, give it back and return false. */
bool dmb_start_io(struct dmb_batch *batch, struct dmb_io *io);
/* Handle the completion of a request. */
void dmb_finish_io(struct dmb_io *io, int result);
/* Assign a staging block to a request and set its address. Returns 0 or -errno. */
int dmb_take_block(struct dmb_batch *batch, struct dmb_io *io);
/* Record that io failed; the failure with the lowest position is kept. */
void dmb_fail(struct dmb_batch *batch, const struct dmb_io *io, int error);

/* -- bisect.c: which block is bad */

/* Start again at the failed request, one request at a time; false if that was done already. */
bool dmb_retry_alone(struct dmb_batch *batch);
/* Begin to search for the bad block in the failed request; false if that is not needed. */
bool dmb_begin_bisect(struct dmb_batch *batch);
/* Use the result of the first half; true when the search has ended. */
bool dmb_bisect_narrow(struct dmb_batch *batch);
/* Issue the first half of the range that holds the bad block. */
void dmb_bisect_half(struct dmb_batch *batch);

/* -- cache.c: the page cache after a write */

/* Drop the pages that the first pass wrote; false if it must be called again. */
bool dmb_drop_written(struct dmb_batch *batch);
/* Issue the flush of the edges; false if nothing is in flight for it. */
bool dmb_begin_flush(struct dmb_batch *batch);
void dmb_end_flush(struct dmb_io *io, int result);

/* -- pacing.c: reissues, and requests that kernel threads submit */

int64_t dmb_now_ms(void);
void dmb_sleep_ns(long ns);
/* Return whether a kernel thread submits a request, because submission could block. */
bool dmb_needs_async(const struct dmb_batch *batch, uint32_t length);
/* Return whether the batch ends before io's bytes. */
bool dmb_is_abandoned(const struct dmb_batch *batch, const struct dmb_io *io);
/* Return whether a result is EAGAIN or EINTR. */
bool dmb_is_transient(int result);
bool dmb_may_reissue(const struct dmb_io *io, int result);
/* Issue a list of requests again, after a pause if one was reissued often. */
void dmb_reissue(struct dmb_ring *ring, struct dmb_io *list);

#endif
