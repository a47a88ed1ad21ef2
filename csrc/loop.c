/* SPDX-License-Identifier: MIT */
/*
 * Many batches on one ring, driven by an event loop that must not block.
 *
 * The ring's depth bounds the requests in flight. Batches with completions run first, because they
 * may be done. Batches that have more requests to submit wait in a queue, and each submits a share
 * when it reaches the head.
 */
#include <errno.h>
#include <sys/eventfd.h>

#include "internal.h"

enum {
	SHARE = 8,  /* requests that a batch submits at once while other batches wait */
	ROUNDS = 4, /* rounds of one poll, before the event loop runs other tasks */
};

void dmb_queue_remove(struct dmb_entry *entry)
{
	struct dmb_queue *queue = entry->in;

	if (!queue)
		return;
	*(entry->prev ? &entry->prev->next : &queue->first) = entry->next;
	*(entry->next ? &entry->next->prev : &queue->last) = entry->prev;
	entry->next = entry->prev = NULL;
	entry->in = NULL;
}

static void enqueue(struct dmb_queue *queue, struct dmb_entry *entry)
{
	dmb_queue_remove(entry);
	entry->in = queue;
	entry->prev = queue->last;
	*(queue->last ? &queue->last->next : &queue->first) = entry;
	queue->last = entry;
}

void dmb_queue_start(struct dmb_ring *ring, struct dmb_entry *entry, uint64_t tag)
{
	entry->tag = tag;
	entry->started = true;
	enqueue(&ring->waiting, entry);
}

void dmb_queue_completed(struct dmb_ring *ring, struct dmb_entry *entry)
{
	if (entry->started && !entry->in) /* a waiting batch keeps its place */
		enqueue(&ring->runnable, entry);
}

void dmb_queue_promote(struct dmb_ring *ring, struct dmb_entry *entry)
{
	if (entry->started && entry->in != &ring->done)
		enqueue(&ring->runnable, entry);
}

static uint32_t room(const struct dmb_ring *ring)
{
	uint32_t most = ring->info.depth ? ring->info.depth : 1; /* no workers: one at a time */

	return ring->in_flight < most ? most - ring->in_flight : 0;
}

static void step_batch(struct dmb_ring *ring, struct dmb_entry *entry, uint32_t quota)
{
	enum dmb_step step;

	dmb_queue_remove(entry);
	step = dmb_batch_step(entry->batch, quota);
	if (step == DMB_STEP_DONE) {
		enqueue(&ring->done, entry);
		entry->started = false;
	} else if (step == DMB_STEP_OVER_QUOTA) {
		enqueue(&ring->waiting, entry);
	}
}

static void step_batches(struct dmb_ring *ring)
{
	struct dmb_entry *entry;

	while ((entry = ring->runnable.first))
		step_batch(ring, entry, ring->waiting.first ? 0 : room(ring));
	while ((entry = ring->waiting.first) && room(ring))
		step_batch(ring, entry,
			   entry->next ? (uint32_t)dmb_min(room(ring), SHARE) : room(ring));
}

static void report(struct dmb_ring *ring, struct dmb_done *done, uint32_t capacity, uint32_t *ret)
{
	struct dmb_entry *entry;

	while (*ret < capacity && (entry = ring->done.first)) {
		done[(*ret)++] = (struct dmb_done){entry->tag, dmb_batch_nbytes(entry->batch)};
		dmb_queue_remove(entry);
	}
}

int dmb_ring_poll(struct dmb_ring *ring, struct dmb_done *done, uint32_t capacity, uint32_t *ret)
{
	bool more = true;
	int rc = 0;

	for (int round = 0; more && !rc && round < ROUNDS; round++) {
		step_batches(ring);
		if (round && !ring->issued) {
			more = false;
			break;
		}
		rc = ring->ops->poll(ring);
		more = dmb_reap(ring, UINT32_MAX);
	}
	step_batches(ring);
	if ((more || ring->issued) && ring->eventfd >= 0)
		eventfd_write(ring->eventfd, 1); /* more to do: the event loop polls again */
	report(ring, done, capacity, ret);
	return rc;
}

int dmb_job_start_small(struct dmb_ring *ring, const struct dmb_job *job, uint64_t offset,
			uint64_t start, uint64_t size, int fence, uint64_t tag,
			struct dmb_batch **ret)
{
	const uint64_t segment[3] = {offset, start, size};
	struct dmb_job one = *job;
	int rc;

	if (!dmb_is_small(job, offset, start, size, fence))
		return -EOPNOTSUPP;
	one.memory_align = 1; /* the range meets both alignments */
	one.page = job->offset_align;
	one.file_size = offset + size;
	one.route = DMB_DIRECT;
	one.file_slot = -1;
	one.slots = NULL;
	one.depth = 1;
	one.block = (uint32_t)size;
	rc = dmb_batch_create(ring, &one, segment, 1, ret);
	if (!rc)
		dmb_batch_start(*ret, tag);
	return rc;
}

int dmb_ring_set_eventfd(struct dmb_ring *ring, int fd)
{
	int rc = 0;

	if (ring->info.backend == DMB_BACKEND_URING) {
		if (ring->eventfd >= 0)
			rc = io_uring_unregister_eventfd(&ring->uring);
		if (!rc && fd >= 0)
			rc = io_uring_register_eventfd(&ring->uring, fd);
	}
	if (!rc)
		ring->eventfd = fd;
	return rc;
}
