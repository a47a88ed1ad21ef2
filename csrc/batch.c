/* SPDX-License-Identifier: MIT */
/*
 * A batch takes an array of segments through a ring: cut into requests, a queue depth of them in
 * flight, short ones continued, EAGAIN and EINTR issued again. The first error stops it: what is in
 * flight is waited for, the failed request is halved down to the block that cannot be moved, and
 * the result tells how much lies before it without a gap.
 *
 * The block layer merges neighbouring requests, and a bad block fails all that were merged. So what
 * was in flight with a request that failed is first done again, one request at a time, and only the
 * one that fails alone holds a bad block.
 *
 * Phases: MIDDLE, then BISECT where a request failed, then the DROP of what a write left in the
 * page cache, then its EDGES and their FLUSH, then DONE.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum {
	REISSUES_AT_ONCE = 16,
	REISSUES_MAX = 256, /* the last 240 after 100 us each: a storm of 24 ms ends the request */
	REISSUE_PAUSE_NS = 100000,
	DRAIN_WARNING_MS = 5000,
	DRAIN_PAUSE_NS = 10000000, /* where waiting itself fails */
	HEAVY_BYTES = 65536,	   /* copied by the kernel while it takes the request */
	TELLING = 8,		   /* requests that no device completes all at once */
	FEW = 4,		   /* handled before more are submitted, so that no device idles */
	PAUSES = 64,		   /* of DMB_PAUSE_NS, for pages that cannot be dropped yet */
};

enum phase { MIDDLE, BISECT, DROP, EDGES, FLUSH, DONE };

struct dmb_batch {
	struct dmb_ring *ring;
	struct dmb_turn turn;
	struct dmb_job own_job; /* of a lone request, as its segment */
	uint64_t own_segment[3];
	const struct dmb_job *job;
	const uint64_t *segments;
	size_t count;
	uint64_t total;

	enum phase phase;
	bool stopping;

	/* where the present pass is: a segment, the bytes of all before it, and bytes of it */
	size_t segment;
	uint64_t before;
	uint64_t skip;

	/* positions in all segments; UINT64_MAX for none */
	uint64_t middle_end;  /* the first that the first pass did not issue */
	uint64_t first_edge;  /* the first that waits for the second pass */
	uint64_t stop;	      /* the first that could not be moved */
	uint64_t alone_until; /* requests before it are issued one at a time */

	struct dmb_io failed; /* the failed request with the lowest position; error 0 for none */
	int error;

	/* positions while BISECT looks for the bad block */
	uint64_t bad_position, bad_end, bad_skip;
	uint64_t tried_end;
	int bad_error;

	uint64_t edge_start, edge_end; /* the part of the file that edges were written to */
	uint64_t flush_from;	       /* position of the first edge: what a failed flush loses */
	uint32_t pauses;	       /* of DROP */

	struct dmb_stage stage; /* empty until a request needs a block */
	bool by_workers;	/* the CPU moves the bytes: then several do */
	uint32_t at_once;	/* waits in a row after which all was complete */
	uint32_t odd;
	uint32_t length; /* of the last request */
	uint32_t in_flight;
	struct dmb_io *ios;
	struct dmb_io *free;
	struct dmb_result result;
};

static int64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int64_t now_ms(void)
{
	return now_ns() / 1000000;
}

static void nap(long ns)
{
	const struct timespec time = {.tv_nsec = ns};

	nanosleep(&time, NULL);
}

static bool power_of_two(uint32_t value)
{
	return value && !(value & (value - 1));
}

static bool valid(const struct dmb_job *job)
{
	return job->depth && job->block && power_of_two(job->offset_align) &&
	       power_of_two(job->memory_align) && power_of_two(job->page) &&
	       !(job->block % job->offset_align) && !(job->block % job->memory_align) &&
	       (!job->slots || job->slot_size) &&
	       (!job->nsid || job->offset_align == 1ULL << job->lba_shift);
}

int dmb_batch_create(struct dmb_ring *ring, const struct dmb_job *job, const uint64_t *segments,
		     size_t count, struct dmb_batch **ret)
{
	struct dmb_batch *batch;

	if (!valid(job))
		return -EINVAL;
	batch = calloc(1, sizeof(*batch));
	if (!batch)
		return -ENOMEM;
	batch->ios = calloc(job->depth, sizeof(*batch->ios));
	if (!batch->ios) {
		free(batch);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < job->depth; i++) {
		batch->ios[i].batch = batch;
		batch->ios[i].next = batch->free;
		batch->free = &batch->ios[i];
	}
	for (size_t i = 0; i < count; i++)
		batch->total += segments[3 * i + 2];
	batch->ring = ring;
	batch->turn.batch = batch;
	batch->job = job;
	batch->by_workers = job->by_workers;
	batch->segments = segments;
	batch->count = count;
	batch->middle_end = batch->first_edge = batch->stop = UINT64_MAX;
	batch->edge_start = UINT64_MAX;
	batch->result.short_segment = -1;
	*ret = batch;
	return 0;
}

static void give_back(struct dmb_batch *batch, struct dmb_io *io)
{
	if (io->block)
		dmb_stage_give(&batch->stage, io->block);
	io->block = NULL;
	io->busy = false;
	io->next = batch->free;
	batch->free = io;
	batch->in_flight--;
	batch->ring->in_flight--;
	dmb_turn_touch(batch->ring, &batch->turn);
}

/* io's bytes from `position` on did not move. */
static void stop_at(struct dmb_batch *batch, const struct dmb_io *io)
{
	batch->stop = dmb_min(batch->stop, io->position);
}

/* Of all that ends a batch, an error or the end of the file, the lowest position counts. */
static void fail(struct dmb_batch *batch, const struct dmb_io *io, int error)
{
	if (io->position > batch->stop)
		return;
	batch->stop = io->position;
	batch->error = error;
	batch->failed = *io;
	batch->result.short_segment = -1;
}

/* A batch has its own blocks, in the memory that the ring's last batch left where that is enough.
 */
static int make_stage(struct dmb_batch *batch)
{
	/* not where an event loop waits meanwhile */
	bool large = batch->job->route == DMB_STAGED && batch->ring->eventfd < 0;

	batch->stage = batch->ring->stage;
	batch->ring->stage = (struct dmb_stage){0};
	return dmb_stage_reserve(&batch->stage, batch->job->depth, batch->job->block, large);
}

static void leave_stage(struct dmb_batch *batch)
{
	struct dmb_stage *spare = &batch->ring->stage, mine = batch->stage;

	if (spare->size < mine.size) {
		batch->stage = *spare;
		*spare = mine;
	}
	dmb_stage_release(&batch->stage);
}

static int take_block(struct dmb_batch *batch, struct dmb_io *io)
{
	int rc;

	if (!batch->stage.count) {
		rc = make_stage(batch);
		if (rc)
			return rc;
	}
	if (!io->block)
		io->block = dmb_stage_take(&batch->stage);
	io->address = io->block;
	return 0;
}

/* Whether a request is left to a thread of the kernel's. */
static bool is_heavy(struct dmb_batch *batch, uint32_t length)
{
	if (length < HEAVY_BYTES)
		return batch->job->by_workers; /* where it goes in the end */
	if (batch->job->route == DMB_BUFFERED)
		/* an event loop must not wait; and writes of a file are done one at a time */
		return batch->ring->eventfd >= 0 ||
		       (batch->job->in_memory && batch->job->direction == DMB_READ);
	if (!batch->by_workers)
		return false;
	/* where we copy as well, half of them: so we have half of all there is to do */
	return batch->job->route != DMB_STAGED || ++batch->odd % 2;
}

/*
 * Devices that are memory (zram, brd, pmem) move the bytes while they take the request, by the CPU
 * that hands it in, and all are complete when that is over. One CPU is not all that memory can do.
 */
static void judge(struct dmb_batch *batch, uint32_t in_flight)
{
	if (in_flight < TELLING || batch->job->nsid)
		return;
	batch->at_once = batch->ring->ready < in_flight ? 0 : batch->at_once + 1;
	if (batch->at_once == 2) /* once may be because we had to wait for a CPU */
		batch->by_workers = true;
}

/* Shape the next request of io's `left` bytes and hand it to the ring. */
static int issue(struct dmb_batch *batch, struct dmb_io *io)
{
	const uint64_t *segment = batch->segments + 3 * io->segment;
	int rc;

	dmb_shape(batch->job, batch->segments, io, batch->phase == EDGES);
	if (io->native && io->buffer_slot < 0)
		return -EFAULT; /* nothing registered: its offset would be taken for an address */
	io->heavy = is_heavy(batch, io->length);
	batch->length = io->length;
	if (io->staged) {
		if (!batch->job->base)
			return -EFAULT; /* memory that the CPU cannot map has no edges */
		rc = take_block(batch, io);
		if (rc)
			return rc;
		io->memory = dmb_address(batch->job, segment, io->skip);
		if (io->direction == DMB_WRITE && !batch->ring->threads)
			dmb_fill_block(io);
	}
	return batch->ring->ops->issue(batch->ring, io);
}

void dmb_fill_block(struct dmb_io *io)
{
	memcpy(io->block, io->memory, io->want);
}

static uint64_t wanted(const struct dmb_io *io, uint64_t moved)
{
	return moved > io->lead ? dmb_min(moved - io->lead, io->want) : 0;
}

void dmb_empty_block(struct dmb_io *io, uint64_t moved)
{
	memcpy(io->memory, io->block + io->lead, wanted(io, moved));
}

/* Nobody waits for io's bytes any more: the batch ends before them. */
static bool abandoned(const struct dmb_batch *batch, const struct dmb_io *io)
{
	return batch->stopping || io->position >= batch->stop;
}

static bool transient(int result)
{
	return result == -EAGAIN || result == -EINTR;
}

/* Bytes of io's want that the completion moved; those of a staged read go to the buffer. */
static uint64_t settle(struct dmb_batch *batch, struct dmb_io *io, uint64_t moved)
{
	uint64_t got = wanted(io, moved);

	if (io->direction == DMB_WRITE && batch->phase != EDGES &&
	    batch->job->route != DMB_BUFFERED)
		got = dmb_align_down(got, batch->job->offset_align); /* goes on at a block */
	if (io->staged && io->direction == DMB_READ && !batch->ring->threads)
		dmb_empty_block(io, moved);
	if (io->straight)
		batch->result.straight += got;
	else
		batch->result.copied += got;
	if (batch->phase == EDGES && got) {
		batch->edge_start = dmb_min(batch->edge_start, io->offset);
		if (io->offset + got > batch->edge_end)
			batch->edge_end = io->offset + got;
	}
	io->skip += got;
	io->position += got;
	io->left -= got;
	io->want -= got;
	return got;
}

static void meet_end_of_file(struct dmb_batch *batch, const struct dmb_io *io)
{
	if (io->position > batch->stop)
		return;
	batch->stop = io->position;
	batch->error = 0;
	batch->result.short_segment = (int64_t)io->segment;
}

/* What io's completion means: true where io goes on with what is left of it. */
static bool complete(struct dmb_batch *batch, struct dmb_io *io, int result)
{
	int rc;

	if ((result == -ECANCELED || transient(result)) && abandoned(batch, io)) {
		stop_at(batch, io);
		return false;
	}
	if (result < 0) {
		fail(batch, io, -result);
		return false;
	}
	if (!settle(batch, io, (uint64_t)result)) {
		if (io->direction == DMB_READ)
			meet_end_of_file(batch, io);
		else
			fail(batch, io, EIO); /* less than a block: no device does that */
		return false;
	}
	if (!io->left)
		return false;
	if (abandoned(batch, io)) {
		stop_at(batch, io);
		return false;
	}
	io->reissues = 0;
	rc = issue(batch, io);
	if (rc)
		fail(batch, io, -rc);
	return !rc;
}

static int filtered(const struct dmb_ring *ring, const struct dmb_io *io)
{
	struct dmb_completion completion = {
		.direction = io->direction,
		.straight = io->straight,
		.offset = io->offset,
		.size = io->length,
		.result = io->result,
	};

	return ring->filter ? ring->filter(ring->filter_arg, &completion) : io->result;
}

static void end_flush(struct dmb_io *io, int result);

static void finish(struct dmb_io *io, int result)
{
	if (io->kind == DMB_FLUSH) {
		end_flush(io, result);
		return;
	}
	if (io->kind == DMB_PAUSE) {
		give_back(io->batch, io);
		return;
	}
	io->batch->result.requests++;
	if (complete(io->batch, io, result))
		return;
	if (io->batch->job->latencies)
		io->batch->job->latencies[io->segment] = (uint64_t)(now_ns() - io->began);
	give_back(io->batch, io);
}

static bool may_reissue(const struct dmb_io *io, int result)
{
	return transient(result) && !abandoned(io->batch, io) && io->reissues < REISSUES_MAX;
}

/* Issue all of a list again, after a pause where one of them was often. */
static void reissue(struct dmb_ring *ring, struct dmb_io *list)
{
	bool often = false;

	for (struct dmb_io *io = list; io; io = io->next)
		often = io->reissues++ >= REISSUES_AT_ONCE || often;
	if (often)
		nap(REISSUE_PAUSE_NS);
	while (list) {
		struct dmb_io *io = list;
		int rc;

		list = io->next;
		io->batch->result.reissues++;
		rc = ring->ops->issue(ring, io);
		if (rc)
			finish(io, rc);
	}
}

bool dmb_reap(struct dmb_ring *ring, uint32_t most)
{
	struct dmb_io *io, *again = NULL;
	bool any = false;

	while (most-- && (io = ring->ops->reap(ring))) {
		int result = io->kind == DMB_MOVE ? filtered(ring, io) : io->result;

		any = true;
		if (may_reissue(io, result)) {
			io->next = again;
			again = io;
		} else {
			finish(io, result);
		}
	}
	reissue(ring, again);
	return any;
}

/* Moves the cursor to the pass's next bytes of `left`; false at its end. */
static bool advance_cursor(struct dmb_batch *batch, uint64_t *left)
{
	for (; batch->segment < batch->count; batch->segment++) {
		const uint64_t *segment = batch->segments + 3 * batch->segment;
		uint64_t start, end, size = segment[2];

		dmb_middle(batch->job, segment, &start, &end);
		if (batch->phase == MIDDLE) {
			if (start)
				batch->first_edge = dmb_min(batch->first_edge, batch->before);
			if (end < size)
				batch->first_edge = dmb_min(batch->first_edge, batch->before + end);
			if (batch->skip < start)
				batch->skip = start;
			*left = end > batch->skip ? end - batch->skip : 0;
		} else if (batch->skip < start) {
			*left = start - batch->skip;
		} else {
			if (batch->skip < end)
				batch->skip = end;
			*left = size - batch->skip;
		}
		if (*left)
			return true;
		batch->before += size;
		batch->skip = 0;
	}
	return false;
}

static struct dmb_io *take_io(struct dmb_batch *batch, size_t segment, uint64_t skip,
			      uint64_t position, uint64_t left)
{
	struct dmb_io *io = batch->free;

	batch->free = io->next;
	batch->in_flight++;
	batch->ring->in_flight++;
	io->busy = true;
	io->kind = DMB_MOVE;
	io->heavy = false;
	io->segment = segment;
	io->skip = skip;
	io->position = position;
	io->left = left;
	io->reissues = 0;
	if (batch->job->latencies)
		io->began = now_ns();
	return io;
}

/* Issue one request; false where that failed. */
static bool start(struct dmb_batch *batch, struct dmb_io *io)
{
	int rc = issue(batch, io);

	if (!rc)
		return true;
	fail(batch, io, -rc);
	give_back(batch, io);
	return false;
}

/* Make the pass's next requests, at most `quota`; false where there would be more. */
static bool fill_pass(struct dmb_batch *batch, uint32_t quota)
{
	uint64_t left;

	if (batch->phase != MIDDLE && batch->phase != EDGES)
		return true;
	while (batch->free && !batch->stopping && advance_cursor(batch, &left)) {
		uint64_t position = batch->before + batch->skip;
		struct dmb_io *io;

		if (position >= batch->stop)
			return true;
		if (position < batch->alone_until && batch->in_flight)
			return true;
		if (!quota--)
			return false;
		io = take_io(batch, batch->segment, batch->skip, position, left);
		if (!start(batch, io))
			return true;
		io->left = io->want; /* the rest is the next request's */
		batch->skip += io->want;
	}
	return true;
}

/* The bad range, [bad_position, bad_end), may hold good blocks before the bad one. */
static void try_half(struct dmb_batch *batch)
{
	uint64_t unit = batch->job->offset_align;
	uint64_t offset = batch->segments[3 * batch->failed.segment] + batch->bad_skip;
	uint64_t middle = dmb_align_down(offset + (batch->bad_end - batch->bad_position) / 2, unit);

	if (middle <= offset)
		middle = dmb_align_down(offset, unit) + unit;
	batch->error = 0;
	batch->stop = UINT64_MAX;
	batch->tried_end = batch->bad_position + (middle - offset);
	start(batch, take_io(batch, batch->failed.segment, batch->bad_skip, batch->bad_position,
			     middle - offset));
}

static bool one_block_is_bad(const struct dmb_batch *batch)
{
	uint64_t unit = batch->job->offset_align;
	uint64_t offset = batch->segments[3 * batch->failed.segment] + batch->bad_skip;
	uint64_t size = batch->bad_end - batch->bad_position;

	return !size || dmb_align_down(offset, unit) == dmb_align_down(offset + size - 1, unit);
}

/* Whether a request failed for what the medium holds, and was not left for another reason. */
static bool bad_medium(const struct dmb_batch *batch)
{
	if (batch->stopping || batch->stop < batch->failed.position)
		return false;
	return batch->error == EIO || batch->error == ENODATA || batch->error == EILSEQ ||
	       batch->error == EREMOTEIO;
}

/* Go back to the request that failed, unless it was alone; false where there is nothing to do. */
static bool go_back(struct dmb_batch *batch)
{
	const struct dmb_io *failed = &batch->failed;
	uint64_t issued = batch->before + batch->skip;

	if (!bad_medium(batch) || batch->job->depth == 1)
		return false;
	if (failed->position < batch->alone_until || failed->position >= issued)
		return false;
	batch->alone_until = issued;
	batch->segment = failed->segment;
	batch->before = failed->position - failed->skip;
	batch->skip = failed->skip;
	batch->error = 0;
	batch->stop = UINT64_MAX;
	batch->result.short_segment = -1;
	return true;
}

static bool begin_bisect(struct dmb_batch *batch)
{
	const struct dmb_io *failed = &batch->failed;

	if (!bad_medium(batch))
		return false;
	batch->bad_error = batch->error;
	batch->bad_skip = failed->skip;
	batch->bad_position = failed->position;
	batch->bad_end = failed->position + failed->left;
	batch->tried_end = failed->position;
	return !one_block_is_bad(batch);
}

/* The first half was tried. True where the bad block, or the last chance to find it, is known. */
static bool narrow(struct dmb_batch *batch)
{
	uint64_t reached = dmb_min(batch->tried_end, batch->stop);
	bool unclear = batch->stop != UINT64_MAX && !batch->error; /* end of file, or interrupted */

	batch->bad_skip += reached - batch->bad_position;
	batch->bad_position = reached;
	if (batch->error) {
		batch->bad_error = batch->error;
		batch->bad_end = batch->tried_end;
	}
	if (!unclear && !batch->stopping && !one_block_is_bad(batch))
		return false;
	if (batch->result.short_segment >= 0)
		return true; /* the file became shorter meanwhile */
	batch->error = batch->bad_error;
	batch->failed.skip = batch->bad_skip;
	batch->failed.position = batch->stop = batch->bad_position;
	return true;
}

static void rewind_cursor(struct dmb_batch *batch)
{
	batch->segment = 0;
	batch->before = batch->skip = 0;
}

/*
 * Write the bytes [skip, skip + size) of the present segment once more: a synchronous write waits
 * for pages that are locked, and unmaps those that are mapped, before it drops them.
 */
static int write_again(struct dmb_batch *batch, uint64_t skip, uint64_t size)
{
	const uint64_t *segment = batch->segments + 3 * batch->segment;
	struct dmb_io *io = batch->free;
	int64_t rc;

	if (batch->job->route == DMB_NATIVE)
		return -EBUSY; /* its bytes may be out of the CPU's reach */
	rc = take_block(batch, io);
	if (rc)
		return (int)rc;
	memcpy(io->block, dmb_address(batch->job, segment, skip), size);
	rc = dmb_lone(DMB_WRITE, batch->job->fd, (uintptr_t)io->block, size, segment[0] + skip);
	dmb_stage_give(&batch->stage, io->block);
	io->block = NULL;
	batch->result.copied += size;
	if (rc < 0)
		return (int)rc;
	return (uint64_t)rc == size ? 0 : -EIO;
}

/* Do so for what of the middle [start, end) the page at `at` begins; returns where that ends. */
static uint64_t insist(struct dmb_batch *batch, uint64_t at, uint64_t start, uint64_t end)
{
	const uint64_t *segment = batch->segments + 3 * batch->segment;
	uint64_t from = dmb_align_down(at, batch->job->offset_align);
	uint64_t skip = from > segment[0] + start ? from - segment[0] : start;
	uint64_t size = dmb_min(end - skip, batch->job->block);
	int rc = write_again(batch, skip, size);

	if (rc) {
		const struct dmb_io io = {
			.segment = batch->segment,
			.position = batch->before + skip,
			.skip = skip,
		};

		fail(batch, &io, -rc);
	}
	return segment[0] + skip + size;
}

static bool pause_drop(struct dmb_batch *batch)
{
	struct dmb_io *io;

	if (batch->pauses++ >= PAUSES)
		return false;
	io = take_io(batch, batch->segment, batch->skip, batch->before + batch->skip, 0);
	io->kind = DMB_PAUSE;
	io->staged = io->native = false;
	io->file_slot = io->buffer_slot = -1;
	if (!batch->ring->ops->issue(batch->ring, io))
		return true;
	give_back(batch, io);
	return false;
}

/*
 * Drop from the page cache what the first pass wrote. The kernel drops it before a write, and again
 * when a synchronous one is done; what others read meanwhile would stay there with the old bytes,
 * and an edge that is written through such a page would bring them back to the medium. False where
 * it is to be called again.
 */
static bool drop_written(struct dmb_batch *batch)
{
	const struct dmb_job *job = batch->job;
	const uint64_t page = dmb_page();

	if (!job->stale_cache || job->direction != DMB_WRITE || job->route == DMB_BUFFERED)
		return true;
	if (batch->ring->threads)
		return true; /* whose writes are synchronous */
	for (; batch->segment < batch->count; batch->segment++, batch->skip = 0) {
		const uint64_t *segment = batch->segments + 3 * batch->segment;
		uint64_t start, end, at, limit;

		dmb_middle(job, segment, &start, &end);
		at = dmb_align_down(segment[0] + dmb_max(start, batch->skip), page);
		limit = dmb_align_up(segment[0] + end, page);
		while (end > start && !dmb_drop_range(job->fd, &at, limit)) {
			batch->skip = at > segment[0] ? at - segment[0] : 0;
			if (pause_drop(batch))
				return false;
			at = dmb_align_up(insist(batch, at, start, end), page);
		}
		batch->before += segment[2];
	}
	return true;
}

static bool begin_edges(struct dmb_batch *batch)
{
	if (batch->stopping || batch->first_edge >= batch->stop)
		return false;
	rewind_cursor(batch);
	return true;
}

/* All bytes from a position on may be lost. */
static void fail_from(struct dmb_batch *batch, uint64_t position, int error)
{
	struct dmb_io io = {.position = position, .skip = position};

	while (io.skip >= batch->segments[3 * io.segment + 2])
		io.skip -= batch->segments[3 * io.segment++ + 2];
	fail(batch, &io, error);
}

/*
 * Write the edges out, as a request like all others since it waits for the medium, and drop them
 * from the page cache. Requests have 32 bits for its length: 0 is to the end of the file.
 */
static bool begin_flush(struct dmb_batch *batch)
{
	uint64_t start = dmb_align_down(batch->edge_start, batch->job->page);
	uint64_t size = dmb_align_up(batch->edge_end, batch->job->page) - start;
	struct dmb_io *io;
	int rc;

	if (batch->edge_start == UINT64_MAX)
		return false;
	io = take_io(batch, 0, 0, 0, 0);
	io->kind = DMB_FLUSH;
	io->native = io->staged = io->straight = false;
	io->fd = batch->job->edge_fd;
	io->file_slot = io->buffer_slot = -1;
	io->nsid = 0;
	io->offset = start;
	io->length = size > UINT32_MAX ? 0 : (uint32_t)size;
	rc = batch->ring->ops->issue(batch->ring, io);
	if (rc)
		end_flush(io, rc);
	return !rc;
}

static void end_flush(struct dmb_io *io, int result)
{
	struct dmb_batch *batch = io->batch;

	if (result < 0)
		fail_from(batch, batch->flush_from, -result);
	posix_fadvise(io->fd, (off_t)io->offset, io->length, POSIX_FADV_DONTNEED);
	give_back(batch, io);
}

static void end_edges(struct dmb_batch *batch)
{
	batch->flush_from = batch->first_edge;
	if (batch->segment >= batch->count || batch->before + batch->skip >= batch->stop)
		batch->first_edge = UINT64_MAX; /* written, as far as they count */
	else
		batch->first_edge = batch->before + batch->skip;
}

/* Nothing is in flight and nothing was issued: what comes next? */
static void next_phase(struct dmb_batch *batch)
{
	switch (batch->phase) {
	case MIDDLE:
		if (go_back(batch))
			return;
		if (batch->segment < batch->count)
			batch->middle_end = batch->before + batch->skip;
		batch->phase = begin_bisect(batch) ? BISECT : DROP;
		break;
	case BISECT:
		if (narrow(batch))
			batch->phase = DROP;
		break;
	case DROP:
		if (!drop_written(batch))
			return;
		batch->phase = begin_edges(batch) ? EDGES : DONE;
		return;
	case EDGES:
		end_edges(batch);
		batch->phase = FLUSH;
		if (!begin_flush(batch))
			batch->phase = DONE;
		return;
	case FLUSH:
		batch->phase = DONE;
		return;
	case DONE:
		return;
	}
	if (batch->phase == BISECT)
		try_half(batch);
	else
		rewind_cursor(batch);
}

/*
 * How many completions are worth waking up for. Threads of the kernel's that move the bytes need
 * the CPU themselves: one of each eight small requests then, and no more than HEAVY_BYTES.
 */
static uint32_t worth_waking(const struct dmb_batch *batch)
{
	uint64_t count = batch->in_flight / 8;

	if (!batch->job->by_workers || !batch->length)
		return 1;
	return (uint32_t)dmb_max(dmb_min(count, HEAVY_BYTES / batch->length), 1);
}

/*
 * A device that completes many requests at once has nothing to do until it gets more. So the first
 * few that are handled make room for as many, which are submitted before the next are handled,
 * twice as many each time.
 */
int dmb_batch_run(struct dmb_batch *batch, int timeout_ms)
{
	const uint32_t few = batch->job->by_workers ? UINT32_MAX : FEW;
	int64_t deadline = now_ms() + timeout_ms, left = timeout_ms;
	uint32_t most = few;

	for (; batch->phase != DONE; left = deadline - now_ms()) {
		int rc;

		fill_pass(batch, UINT32_MAX);
		if (!batch->in_flight) {
			next_phase(batch);
			continue;
		}
		rc = batch->ring->ops->wait(batch->ring, worth_waking(batch),
					    left > 0 ? (int)left : 0);
		if (rc)
			return rc;
		judge(batch, batch->ring->in_flight);
		if (!dmb_reap(batch->ring, most) || left <= 0)
			return 1; /* a signal, or the time is up */
		most = batch->ring->ready > most ? 2 * most : few;
	}
	return 0;
}

/* Nothing more is issued, but the flush of edges that were written. */
static void stop(struct dmb_batch *batch)
{
	batch->stopping = true;
	for (uint32_t i = 0; batch->in_flight && i < batch->job->depth; i++)
		if (batch->ios[i].busy && batch->ios[i].kind == DMB_MOVE)
			batch->ring->ops->cancel(batch->ring, &batch->ios[i]);
}

void dmb_batch_drain(struct dmb_batch *batch)
{
	int64_t warn_at = now_ms() + DRAIN_WARNING_MS;

	stop(batch);
	while (batch->in_flight || batch->phase != DONE) {
		if (!batch->in_flight) {
			next_phase(batch);
			continue;
		}
		if (batch->ring->ops->wait(batch->ring, 1, 1000))
			nap(DRAIN_PAUSE_NS);
		dmb_reap(batch->ring, UINT32_MAX);
		if (batch->in_flight && now_ms() >= warn_at) {
			fprintf(stderr,
				"dmabuf: interrupted, and waiting for the device: it still owns "
				"the "
				"memory of %u requests\n",
				batch->in_flight);
			warn_at = INT64_MAX;
		}
	}
}

enum dmb_step dmb_batch_step(struct dmb_batch *batch, uint32_t quota)
{
	while (batch->phase != DONE) {
		if (!fill_pass(batch, quota))
			return DMB_STEP_WANTS_ROOM;
		if (batch->in_flight)
			return DMB_STEP_FLYING;
		if (!quota && (batch->error || batch->phase == EDGES ||
			       (batch->phase == DROP && batch->job->stale_cache)))
			return DMB_STEP_WANTS_ROOM; /* to look for the bad block, pause, or flush */
		next_phase(batch);
	}
	return DMB_STEP_DONE;
}

void dmb_batch_start(struct dmb_batch *batch, uint64_t tag)
{
	dmb_turn_begin(batch->ring, &batch->turn, tag);
}

void dmb_batch_stop(struct dmb_batch *batch)
{
	stop(batch);
	dmb_turn_hurry(batch->ring, &batch->turn);
}

int dmb_batch_start_lone(struct dmb_ring *ring, const struct dmb_lane *lane, uint64_t offset,
			 uint64_t start, uint64_t size, int fence, uint64_t tag)
{
	const uint64_t segment[3] = {offset, start, size};
	const struct dmb_job job = {
		.fd = lane->fd,
		.file_slot = -1,
		.edge_fd = -1,
		.offset_align = lane->unit,
		.memory_align = 1,
		.page = lane->unit,
		.file_size = offset + size,
		.base = lane->base,
		.size = lane->size,
		.direction = lane->direction,
		.route = DMB_DIRECT,
		.stale_cache = lane->stale_cache,
		.depth = 1,
		.block = (uint32_t)size,
	};
	struct dmb_batch *batch;
	int rc;

	if (!dmb_lane_takes(lane, offset, start, size, fence))
		return 1;
	rc = dmb_batch_create(ring, &job, segment, 1, &batch);
	if (rc)
		return rc;
	dmb_turn_own(ring, &batch->turn);
	batch->own_job = job;
	memcpy(batch->own_segment, segment, sizeof(segment));
	batch->job = &batch->own_job;
	batch->segments = batch->own_segment;
	dmb_batch_start(batch, tag);
	return 0;
}

uint64_t dmb_batch_nbytes(const struct dmb_batch *batch)
{
	uint64_t nbytes = dmb_min(batch->total, batch->stop);

	nbytes = dmb_min(nbytes, batch->middle_end);
	nbytes = dmb_min(nbytes, batch->first_edge);
	return batch->phase == DONE ? nbytes : 0;
}

void dmb_batch_get_result(const struct dmb_batch *batch, struct dmb_result *ret)
{
	*ret = batch->result;
	ret->nbytes = dmb_batch_nbytes(batch);
	ret->error = batch->error;
	if (batch->error) {
		ret->failed_straight = batch->failed.straight;
		ret->nvme_status = (uint32_t)batch->failed.status;
		ret->error_offset = batch->segments[3 * batch->failed.segment] + batch->failed.skip;
	}
}

void dmb_batch_destroy(struct dmb_batch *batch)
{
	if (!batch)
		return;
	dmb_batch_drain(batch);
	dmb_turn_leave(&batch->turn);
	dmb_turn_disown(batch->ring, &batch->turn);
	leave_stage(batch);
	free(batch->ios);
	free(batch);
}
