/* SPDX-License-Identifier: MIT */
/*
 * A batch moves an array of segments on a ring. It cuts them into requests, keeps up to a queue
 * depth of them in flight, continues short ones, and issues them again after EAGAIN or EINTR. The
 * first error stops it: it waits for the requests in flight, searches for the block that cannot be
 * moved, and reports how many bytes lie before that without a gap.
 *
 * Phases: MIDDLE; BISECT, if a request failed; DROP of written pages from the page cache; EDGES of
 * a write; FLUSH of the edges; DONE.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "batch.h"

enum {
	DRAIN_WARNING_MS = 5000,
	DRAIN_PAUSE_NS = 10000000, /* if the wait itself fails */
	FIRST_REAP = 4,		   /* completions handled before more requests are submitted */
};

static bool power_of_two(uint32_t value)
{
	return value && !(value & (value - 1));
}

static bool valid(const struct dmb_job *job)
{
	return job->depth && job->block && power_of_two(job->offset_align) &&
	       power_of_two(job->memory_align) && power_of_two(job->page) &&
	       !(job->block % job->offset_align) && !(job->block % job->memory_align) &&
	       (!job->slots || job->slot_size) && (!job->extents || job->direction == DMB_READ) &&
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
	batch->entry.batch = batch;
	batch->job = *job;
	batch->segments = segments;
	if (count == 1)
		batch->segments = memcpy(batch->own_segment, segments, sizeof(batch->own_segment));
	batch->count = count;
	batch->middle_end = batch->first_edge = batch->stop = UINT64_MAX;
	batch->edge_start = UINT64_MAX;
	batch->result.short_segment = -1;
	*ret = batch;
	return 0;
}

void dmb_give_io(struct dmb_batch *batch, struct dmb_io *io)
{
	if (io->block)
		dmb_stage_give(&batch->stage, io->block);
	io->block = NULL;
	io->busy = false;
	io->next = batch->free;
	batch->free = io;
	batch->in_flight--;
	batch->ring->in_flight--;
	dmb_queue_completed(batch->ring, &batch->entry);
}

/* Record that the bytes from io's position on were not moved. */
static void stop_at(struct dmb_batch *batch, const struct dmb_io *io)
{
	batch->stop = dmb_min(batch->stop, io->position);
}

void dmb_fail(struct dmb_batch *batch, const struct dmb_io *io, int error)
{
	if (io->position > batch->stop)
		return;
	batch->stop = io->position;
	batch->error = error;
	batch->failed = *io;
	batch->result.short_segment = -1;
}

/* Make the batch's staging blocks, in the ring's spare memory if that is large enough. */
static int acquire_stage(struct dmb_batch *batch)
{
	/* collapsing huge pages would block an event loop */
	bool large = batch->job.route == DMB_STAGED && batch->ring->eventfd < 0;

	batch->stage = batch->ring->stage;
	batch->ring->stage = (struct dmb_stage){0};
	return dmb_stage_reserve(&batch->stage, batch->job.depth, batch->job.block, large);
}

static void return_stage(struct dmb_batch *batch)
{
	struct dmb_stage *spare = &batch->ring->stage, mine = batch->stage;

	if (spare->size < mine.size) {
		batch->stage = *spare;
		*spare = mine;
	}
	dmb_stage_release(&batch->stage);
}

int dmb_take_block(struct dmb_batch *batch, struct dmb_io *io)
{
	int rc;

	if (!batch->stage.count) {
		rc = acquire_stage(batch);
		if (rc)
			return rc;
	}
	if (!io->block)
		io->block = dmb_stage_take(&batch->stage);
	io->address = io->block;
	return 0;
}

/* Cut the next request of io's `left` bytes and issue it. */
static int issue(struct dmb_batch *batch, struct dmb_io *io)
{
	const uint64_t *segment = batch->segments + 3 * io->segment;
	int rc;

	dmb_cut_request(&batch->job, batch->segments, io, batch->phase == EDGES);
	/* Not registered: the kernel would take the offset for an address. */
	if (io->native && io->buffer_slot < 0)
		return -EFAULT;
	/* Only a native request does without a mapping: neither the CPU nor O_DIRECT can. */
	if (!io->native && !batch->job.base)
		return -EFAULT;
	io->async = dmb_needs_async(batch, io->length);
	if (io->hole)
		memset(dmb_address(&batch->job, segment, io->skip), 0, io->want);
	if (io->staged) {
		rc = dmb_take_block(batch, io);
		if (rc)
			return rc;
		io->memory = dmb_address(&batch->job, segment, io->skip);
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

/* Count the bytes of the segment that a completion moved, and copy those of a staged read. */
static uint64_t account(struct dmb_batch *batch, struct dmb_io *io, uint64_t moved)
{
	uint64_t got = wanted(io, moved);

	if (io->direction == DMB_WRITE && batch->phase != EDGES && batch->job.route != DMB_BUFFERED)
		got = dmb_align_down(got, batch->job.offset_align); /* continue at a block */
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
	return got;
}

static void record_end_of_file(struct dmb_batch *batch, const struct dmb_io *io)
{
	if (io->position > batch->stop)
		return;
	batch->stop = io->position;
	batch->error = 0;
	batch->result.short_segment = (int64_t)io->segment;
}

/* Handle io's result; return whether io was issued again for the rest of its bytes. */
static bool complete(struct dmb_batch *batch, struct dmb_io *io, int result)
{
	int rc;

	if ((result == -ECANCELED || dmb_is_transient(result)) && dmb_is_abandoned(batch, io)) {
		stop_at(batch, io);
		return false;
	}
	if (result < 0) {
		dmb_fail(batch, io, -result);
		return false;
	}
	if (!account(batch, io, io->hole ? io->want : (uint64_t)result)) {
		if (batch->job.extents && io->length)
			dmb_fail(batch, io, ENODEV); /* the device ends before the file */
		else if (io->direction == DMB_READ)
			record_end_of_file(batch, io);
		else
			dmb_fail(batch, io, EIO); /* a device writes at least a block */
		return false;
	}
	if (!io->left)
		return false;
	if (dmb_is_abandoned(batch, io)) {
		stop_at(batch, io);
		return false;
	}
	io->reissues = 0;
	rc = issue(batch, io);
	if (rc)
		dmb_fail(batch, io, -rc);
	return !rc;
}

void dmb_finish_io(struct dmb_io *io, int result)
{
	if (io->kind == DMB_FLUSH) {
		dmb_end_flush(io, result);
		return;
	}
	if (io->kind == DMB_PAUSE) {
		dmb_give_io(io->batch, io);
		return;
	}
	io->batch->result.requests++;
	if (complete(io->batch, io, result))
		return;
	dmb_give_io(io->batch, io);
}

bool dmb_reap(struct dmb_ring *ring, uint32_t most)
{
	struct dmb_io *io, *again = NULL;
	bool any = false;

	while (most-- && (io = ring->ops->reap(ring))) {
		int result = io->result;

		any = true;
		if (dmb_may_reissue(io, result)) {
			io->next = again;
			again = io;
		} else {
			dmb_finish_io(io, result);
		}
	}
	dmb_reissue(ring, again);
	return any;
}

/* Move the cursor to the pass's next bytes, *left of them; false at its end. */
static bool advance_cursor(struct dmb_batch *batch, uint64_t *left)
{
	for (; batch->segment < batch->count; batch->segment++) {
		const uint64_t *segment = batch->segments + 3 * batch->segment;
		uint64_t start, end, size = segment[2];

		dmb_middle(&batch->job, segment, &start, &end);
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

struct dmb_io *dmb_take_io(struct dmb_batch *batch, size_t segment, uint64_t skip,
			   uint64_t position, uint64_t left)
{
	struct dmb_io *io = batch->free;

	batch->free = io->next;
	batch->in_flight++;
	batch->ring->in_flight++;
	io->busy = true;
	io->kind = DMB_MOVE;
	io->segment = segment;
	io->skip = skip;
	io->position = position;
	io->left = left;
	io->reissues = 0;
	return io;
}

/* Issue one request; false where that failed. */
bool dmb_start_io(struct dmb_batch *batch, struct dmb_io *io)
{
	int rc = issue(batch, io);

	if (!rc)
		return true;
	dmb_fail(batch, io, -rc);
	dmb_give_io(batch, io);
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
		io = dmb_take_io(batch, batch->segment, batch->skip, position, left);
		if (!dmb_start_io(batch, io))
			return true;
		io->left = io->want; /* the next request moves the rest */
		batch->skip += io->want;
	}
	return true;
}

static void rewind_cursor(struct dmb_batch *batch)
{
	batch->segment = 0;
	batch->before = batch->skip = 0;
}

static bool begin_edges(struct dmb_batch *batch)
{
	if (batch->stopping || batch->first_edge >= batch->stop)
		return false;
	rewind_cursor(batch);
	return true;
}

static void end_edges(struct dmb_batch *batch)
{
	batch->flush_from = batch->first_edge;
	if (batch->segment >= batch->count || batch->before + batch->skip >= batch->stop)
		batch->first_edge = UINT64_MAX; /* all edges before `stop` are written */
	else
		batch->first_edge = batch->before + batch->skip;
}

/* Enter the next phase, when no request is in flight. */
static void next_phase(struct dmb_batch *batch)
{
	switch (batch->phase) {
	case MIDDLE:
		if (dmb_retry_alone(batch))
			return;
		if (batch->segment < batch->count)
			batch->middle_end = batch->before + batch->skip;
		batch->phase = dmb_begin_bisect(batch) ? BISECT : DROP;
		break;
	case BISECT:
		if (dmb_bisect_narrow(batch))
			batch->phase = DROP;
		break;
	case DROP:
		if (!dmb_drop_written(batch))
			return;
		batch->phase = begin_edges(batch) ? EDGES : DONE;
		return;
	case EDGES:
		end_edges(batch);
		batch->phase = FLUSH;
		if (!dmb_begin_flush(batch))
			batch->phase = DONE;
		return;
	case FLUSH:
		batch->phase = DONE;
		return;
	case DONE:
		return;
	}
	if (batch->phase == BISECT)
		dmb_bisect_half(batch);
	else
		rewind_cursor(batch);
}

/*
 * After a device completes many requests at once, it is idle until it gets more. So handle a few
 * completions, submit as many new requests, and double the number each time.
 */
int dmb_batch_run(struct dmb_batch *batch, int timeout_ms)
{
	int64_t deadline = dmb_now_ms() + timeout_ms, left = timeout_ms;
	uint32_t most = FIRST_REAP;

	for (; batch->phase != DONE; left = deadline - dmb_now_ms()) {
		int rc;

		fill_pass(batch, UINT32_MAX);
		if (!batch->in_flight) {
			next_phase(batch);
			continue;
		}
		rc = batch->ring->ops->wait(batch->ring, left > 0 ? (int)left : 0);
		if (rc)
			return rc;
		if (!dmb_reap(batch->ring, most) || left <= 0)
			return 1; /* a signal or the timeout */
		most = batch->ring->ready > most ? 2 * most : FIRST_REAP;
	}
	return 0;
}

/* Cancel requests, and issue nothing more except the flush of written edges. */
static void stop(struct dmb_batch *batch)
{
	batch->stopping = true;
	for (uint32_t i = 0; batch->in_flight && i < batch->job.depth; i++)
		if (batch->ios[i].busy && batch->ios[i].kind == DMB_MOVE)
			batch->ring->ops->cancel(batch->ring, &batch->ios[i]);
}

void dmb_batch_drain(struct dmb_batch *batch)
{
	int64_t warn_at = dmb_now_ms() + DRAIN_WARNING_MS;

	stop(batch);
	while (batch->in_flight || batch->phase != DONE) {
		if (!batch->in_flight) {
			next_phase(batch);
			continue;
		}
		if (batch->ring->ops->wait(batch->ring, 1000))
			dmb_sleep_ns(DRAIN_PAUSE_NS);
		dmb_reap(batch->ring, UINT32_MAX);
		if (batch->in_flight && dmb_now_ms() >= warn_at) {
			fprintf(stderr,
				"dmabuf: interrupted, and waiting for the device, which still "
				"owns the memory of %u requests\n",
				batch->in_flight);
			warn_at = INT64_MAX;
		}
	}
}

enum dmb_step dmb_batch_step(struct dmb_batch *batch, uint32_t quota)
{
	while (batch->phase != DONE) {
		if (!fill_pass(batch, quota))
			return DMB_STEP_OVER_QUOTA;
		if (batch->in_flight)
			return DMB_STEP_IN_FLIGHT;
		if (!quota && (batch->error || batch->phase == EDGES ||
			       (batch->phase == DROP && batch->job.stale_cache)))
			return DMB_STEP_OVER_QUOTA; /* BISECT, DROP and FLUSH issue requests */
		next_phase(batch);
	}
	return DMB_STEP_DONE;
}

void dmb_batch_start(struct dmb_batch *batch, uint64_t tag)
{
	dmb_queue_start(batch->ring, &batch->entry, tag);
}

void dmb_batch_stop(struct dmb_batch *batch)
{
	stop(batch);
	dmb_queue_promote(batch->ring, &batch->entry);
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
	dmb_queue_remove(&batch->entry);
	return_stage(batch);
	free(batch->ios);
	free(batch);
}
