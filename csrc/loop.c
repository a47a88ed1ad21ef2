/* SPDX-License-Identifier: MIT */
/*
 * Many batches on one ring, driven by an event loop that must not wait.
 *
 * Requests in flight are bounded by the ring's depth. Batches with completions are looked at first,
 * since they may be done; those that want to make more requests queue up, and each gets a share of
 * the room in its turn.
 */
#include <errno.h>
#include <sys/eventfd.h>

#include "internal.h"

enum {
	SHARE = 8,  /* requests of one turn while others wait */
	ROUNDS = 4, /* then the loop gets to do something else */
};

void dmb_turn_leave(struct dmb_turn *turn)
{
	struct dmb_turns *turns = turn->in;

	if (!turns)
		return;
	*(turn->prev ? &turn->prev->next : &turns->first) = turn->next;
	*(turn->next ? &turn->next->prev : &turns->last) = turn->prev;
	turn->next = turn->prev = NULL;
	turn->in = NULL;
}

static void join(struct dmb_turns *turns, struct dmb_turn *turn)
{
	dmb_turn_leave(turn);
	turn->in = turns;
	turn->prev = turns->last;
	*(turns->last ? &turns->last->next : &turns->first) = turn;
	turns->last = turn;
}

void dmb_turn_begin(struct dmb_ring *ring, struct dmb_turn *turn, uint64_t tag)
{
	turn->tag = tag;
	turn->started = true;
	join(&ring->waiting, turn);
}

void dmb_turn_touch(struct dmb_ring *ring, struct dmb_turn *turn)
{
	if (turn->started && !turn->in) /* one that waits keeps its place */
		join(&ring->touched, turn);
}

void dmb_turn_hurry(struct dmb_ring *ring, struct dmb_turn *turn)
{
	if (turn->started && turn->in != &ring->done)
		join(&ring->touched, turn);
}

void dmb_turn_own(struct dmb_ring *ring, struct dmb_turn *turn)
{
	turn->own = true;
	turn->next_own = ring->own;
	if (ring->own)
		ring->own->prev_own = turn;
	ring->own = turn;
}

void dmb_turn_disown(struct dmb_ring *ring, struct dmb_turn *turn)
{
	if (!turn->own)
		return;
	*(turn->prev_own ? &turn->prev_own->next_own : &ring->own) = turn->next_own;
	if (turn->next_own)
		turn->next_own->prev_own = turn->prev_own;
	turn->own = false;
}

static struct dmb_batch *find_own(const struct dmb_ring *ring, uint64_t tag)
{
	for (const struct dmb_turn *turn = ring->own; turn; turn = turn->next_own)
		if (turn->tag == tag)
			return turn->batch;
	return NULL;
}

int dmb_ring_stop_lone(struct dmb_ring *ring, uint64_t tag)
{
	struct dmb_batch *batch = find_own(ring, tag);

	if (!batch)
		return 0;
	dmb_batch_stop(batch);
	return 1;
}

void dmb_ring_drain_lone(struct dmb_ring *ring, uint64_t tag)
{
	dmb_batch_destroy(find_own(ring, tag)); /* drains */
}

static uint32_t room(const struct dmb_ring *ring)
{
	uint32_t most = ring->info.depth ? ring->info.depth : 1; /* no workers: in place */

	return ring->in_flight < most ? most - ring->in_flight : 0;
}

static void take_turn(struct dmb_ring *ring, struct dmb_turn *turn, uint32_t quota)
{
	enum dmb_step step;

	dmb_turn_leave(turn);
	step = dmb_batch_step(turn->batch, quota);
	if (step == DMB_STEP_DONE) {
		join(&ring->done, turn);
		turn->started = false;
	} else if (step == DMB_STEP_WANTS_ROOM) {
		join(&ring->waiting, turn);
	}
}

static void take_turns(struct dmb_ring *ring)
{
	struct dmb_turn *turn;

	while ((turn = ring->touched.first))
		take_turn(ring, turn, ring->waiting.first ? 0 : room(ring));
	while ((turn = ring->waiting.first) && room(ring))
		take_turn(ring, turn,
			  turn->next ? (uint32_t)dmb_min(room(ring), SHARE) : room(ring));
}

static void tell(struct dmb_ring *ring, struct dmb_done *done, uint32_t capacity, uint32_t *ret)
{
	struct dmb_turn *turn;

	while (*ret < capacity && (turn = ring->done.first)) {
		done[(*ret)++] = (struct dmb_done){turn->tag, dmb_batch_nbytes(turn->batch)};
		dmb_turn_leave(turn);
		if (turn->own)
			dmb_batch_destroy(turn->batch);
	}
}

int dmb_ring_poll(struct dmb_ring *ring, struct dmb_done *done, uint32_t capacity, uint32_t *ret)
{
	bool more = true;
	int rc = 0;

	for (int round = 0; more && !rc && round < ROUNDS; round++) {
		take_turns(ring);
		if (round && !ring->issued) {
			more = false;
			break;
		}
		rc = ring->ops->poll(ring);
		more = dmb_reap(ring, UINT32_MAX);
	}
	take_turns(ring);
	if ((more || ring->issued) && ring->eventfd >= 0)
		eventfd_write(ring->eventfd, 1); /* not all was done: come again */
	tell(ring, done, capacity, ret);
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
