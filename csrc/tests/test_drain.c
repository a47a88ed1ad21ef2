/* SPDX-License-Identifier: MIT */
/* Batches that are interrupted, and rings that refuse to issue or to wait. */
#include "test.h"

#include "../batch.h"

#include <signal.h>
#include <sys/time.h>
#include <time.h>

enum { FILE_SIZE = 100000, MEMORY = 28 * PAGE, SEGMENTS = 4, ROUNDS = 6 };

static struct file file;

static struct dmb_batch *begin(struct dmb_ring *ring, struct dmb_job *job, uint64_t *segments,
			       struct memory *memory, int direction, int route)
{
	struct dmb_batch *batch;

	memory_map(memory, MEMORY);
	*job = make_job(&file, memory, direction, route);
	job->block = PAGE;
	random_segments(segments, SEGMENTS, file.size, memory->size, direction);
	if (direction == DMB_READ)
		memset(memory->bytes, POISON, memory->size);
	else
		random_bytes(memory->bytes, memory->size);
	CHECK_EQUAL(dmb_batch_create(ring, job, segments, SEGMENTS, &batch), 0);
	return batch;
}

/* Drained or destroyed at any moment: what is said to have moved has, and nothing moves after. */
static void interrupt(struct dmb_ring *ring, int direction, int route)
{
	for (unsigned round = 0; round < ROUNDS; round++) {
		uint64_t segments[3 * SEGMENTS];
		struct dmb_result result;
		struct dmb_batch *batch;
		struct memory memory;
		struct dmb_job job;
		int rc = 1;

		context(direction == DMB_READ ? "interrupted read" : "interrupted write", round);
		batch = begin(ring, &job, segments, &memory, direction, route);
		for (uint64_t left = random_below(20); left && rc == 1; left--)
			rc = dmb_batch_run(batch, 0);
		CHECK(rc == 0 || rc == 1);
		if (round % 4) {
			dmb_batch_drain(batch);
			check_idle(ring);
			dmb_batch_get_result(batch, &result);
			CHECK_EQUAL(result.error, 0);
			CHECK_EQUAL(result.short_segment, -1);
			check_moved(&file, &memory, segments, SEGMENTS, direction, result.nbytes,
				    false);
			CHECK_EQUAL(dmb_batch_run(batch, 100), 0);
		}
		dmb_batch_destroy(batch);
		check_idle(ring);
		if (round % 4 == 0)
			check_moved(&file, &memory, segments, SEGMENTS, direction, 0, false);
		memory_unmap(&memory);
	}
}

/* A result that is requested too early claims nothing. */
static void early(struct dmb_ring *ring)
{
	uint64_t segments[3 * SEGMENTS];
	struct dmb_result result;
	struct dmb_batch *batch;
	struct memory memory;
	struct dmb_job job;

	context("early", 0);
	batch = begin(ring, &job, segments, &memory, DMB_READ, DMB_DIRECT);
	dmb_batch_get_result(batch, &result);
	CHECK_EQUAL(result.nbytes, 0);
	dmb_batch_destroy(batch);
	memory_unmap(&memory);
}

static void on_alarm(int signal)
{
	(void)signal;
}

/* A signal every 300 us is not an error. */
static void signals(struct dmb_ring *ring)
{
	const struct sigaction action = {.sa_handler = on_alarm};
	const struct itimerval often = {{0, 300}, {0, 300}}, never = {{0, 0}, {0, 0}};

	CHECK_EQUAL(sigaction(SIGALRM, &action, NULL), 0);
	CHECK_EQUAL(setitimer(ITIMER_REAL, &often, NULL), 0);
	for (unsigned round = 0; round < ROUNDS; round++) {
		int direction = round & 1, route = DMB_DIRECT + (int)(round % 3);
		uint64_t segments[3 * SEGMENTS];
		struct dmb_result result;
		struct dmb_batch *batch;
		struct memory memory;
		struct dmb_job job;

		context("signals", round);
		batch = begin(ring, &job, segments, &memory, direction, route);
		while (dmb_batch_run(batch, 50) == 1)
			;
		dmb_batch_get_result(batch, &result);
		CHECK_EQUAL(result.error, 0);
		dmb_batch_destroy(batch);
		check_moved(&file, &memory, segments, SEGMENTS, direction, result.nbytes, false);
		memory_unmap(&memory);
	}
	CHECK_EQUAL(setitimer(ITIMER_REAL, &never, NULL), 0);
}

/* A ring's own operations, with failures before them. */
static const struct dmb_backend_ops *real;
static unsigned issue_fails_at, waits_that_fail, waits;

static int failing_issue(struct dmb_ring *ring, struct dmb_io *io)
{
	if (issue_fails_at && !--issue_fails_at)
		return -EBUSY;
	return real->issue(ring, io);
}

static int failing_wait(struct dmb_ring *ring, int timeout_ms)
{
	if (++waits <= waits_that_fail)
		return -EEXIST;
	return real->wait(ring, timeout_ms);
}

static void failing_ring(struct dmb_ring *ring, int direction, int route)
{
	struct dmb_backend_ops failing = *ring->ops;

	real = ring->ops;
	failing.issue = failing_issue;
	failing.wait = failing_wait;
	for (unsigned round = 0; round < ROUNDS; round++) {
		uint64_t segments[3 * SEGMENTS];
		struct dmb_result result;
		struct dmb_batch *batch;
		struct memory memory;
		struct dmb_job job;
		bool failed;
		int rc;

		context("a ring that does not issue", round);
		batch = begin(ring, &job, segments, &memory, direction, route);
		ring->ops = &failing;
		issue_fails_at = 1 + (unsigned)random_below(30);
		waits_that_fail = waits = 0;
		while ((rc = dmb_batch_run(batch, 100)) == 1)
			;
		ring->ops = real;
		CHECK_EQUAL(rc, 0);
		failed = !issue_fails_at;
		dmb_batch_get_result(batch, &result);
		CHECK_EQUAL(result.error, failed ? EBUSY : 0);
		if (failed)
			CHECK_EQUAL(result.error_offset,
				    offset_of(segments, SEGMENTS, result.nbytes));
		dmb_batch_destroy(batch);
		check_idle(ring);
		check_moved(&file, &memory, segments, SEGMENTS, direction, result.nbytes, false);
		memory_unmap(&memory);
	}
	issue_fails_at = 0;
}

/* Where waiting fails, run says so, and drain stays until nothing is in flight, without a spin. */
static void failing_waits(struct dmb_ring *ring)
{
	struct dmb_backend_ops failing = *ring->ops;
	uint64_t segments[3 * SEGMENTS];
	struct dmb_batch *batch;
	struct timespec before, after;
	struct memory memory;
	struct dmb_job job;
	int64_t ms;

	context("a ring that does not wait", 0);
	real = ring->ops;
	failing.wait = failing_wait;
	batch = begin(ring, &job, segments, &memory, DMB_READ, DMB_DIRECT);
	segments[2] = PAGE;
	ring->ops = &failing;
	waits_that_fail = 6;
	waits = 0;
	CHECK_EQUAL(dmb_batch_run(batch, 100), -EEXIST);
	clock_gettime(CLOCK_MONOTONIC, &before);
	dmb_batch_destroy(batch);
	clock_gettime(CLOCK_MONOTONIC, &after);
	ring->ops = real;
	ms = (after.tv_sec - before.tv_sec) * 1000 + (after.tv_nsec - before.tv_nsec) / 1000000;
	CHECK(waits <= 7 || ms >= 10 * 5);
	memory_unmap(&memory);
	check_idle(ring);
}

static unsigned cancels;

static void counting_cancel(struct dmb_ring *ring, struct dmb_io *io)
{
	cancels++;
	real->cancel(ring, io);
}

/* A batch that is drained cancels the requests in flight, and no others. */
static void cancelled(struct dmb_ring *ring)
{
	struct dmb_backend_ops counting = *ring->ops;

	real = ring->ops;
	counting.wait = failing_wait;
	counting.cancel = counting_cancel;
	for (unsigned round = 0; round < ROUNDS; round++) {
		uint64_t segments[3 * SEGMENTS];
		struct dmb_batch *batch;
		struct memory memory;
		struct dmb_job job;
		uint32_t in_flight;
		int rc;

		context("cancelled", round);
		batch = begin(ring, &job, segments, &memory, DMB_READ, DMB_DIRECT);
		for (unsigned left = round; left; left--)
			dmb_batch_run(batch, 0);
		ring->ops = &counting;
		waits_that_fail = 1;
		waits = cancels = 0;
		rc = dmb_batch_run(batch, 100);
		CHECK(rc == 0 || rc == -EEXIST);
		in_flight = ring->in_flight;
		dmb_batch_drain(batch);
		CHECK_EQUAL(cancels, in_flight);
		CHECK_EQUAL(batch->phase, DONE);
		ring->ops = real;
		dmb_batch_destroy(batch);
		check_idle(ring);
		memory_unmap(&memory);
	}
}

/* A signal ends a wait at once, whatever the time that is left. */
static void a_signal(struct dmb_ring *ring)
{
	uint64_t segments[3 * SEGMENTS];
	struct dmb_batch *batch;
	struct memory memory;
	struct dmb_job job;

	context("a signal", 0);
	batch = begin(ring, &job, segments, &memory, DMB_READ, DMB_DIRECT);
	dmb_testing_interrupt(0, 1, SIGALRM);
	CHECK_EQUAL(dmb_batch_run(batch, 60000), 1);
	dmb_testing_interrupt(0, 0, 0);
	CHECK_EQUAL(dmb_batch_run(batch, 60000), 0);
	dmb_batch_destroy(batch);
	memory_unmap(&memory);
}

static int32_t stop_after_two_pages(void *arg, const struct dmb_completion *completion)
{
	struct dmb_batch *batch = *(struct dmb_batch **)arg;

	batch->stopping = batch->stopping || completion->offset + completion->size == 2 * PAGE;
	return completion->result;
}

/* Where a write stops before its last edge, it reports what lies before. */
static void stopped_before_an_edge(struct dmb_ring *ring)
{
	uint64_t segments[3] = {0, 0, 2 * PAGE + 10};
	struct dmb_result result;
	struct dmb_batch *batch;
	struct memory memory;
	struct dmb_job job;

	context("stopped before an edge", 0);
	memory_map(&memory, MEMORY);
	random_bytes(memory.bytes, memory.size);
	job = make_job(&file, &memory, DMB_WRITE, DMB_DIRECT);
	CHECK_EQUAL(dmb_batch_create(ring, &job, segments, 1, &batch), 0);
	dmb_testing_set_filter(stop_after_two_pages, &batch);
	CHECK_EQUAL(dmb_batch_run(batch, 60000), 0);
	dmb_testing_set_filter(NULL, NULL);
	dmb_batch_get_result(batch, &result);
	CHECK_EQUAL(result.error, 0);
	CHECK_EQUAL(result.nbytes, 2 * PAGE);
	dmb_batch_destroy(batch);
	check_moved(&file, &memory, segments, 1, DMB_WRITE, result.nbytes, true);
	memory_unmap(&memory);
}

static void invalid(struct dmb_ring *ring)
{
	struct memory memory = {NULL, 0};
	struct dmb_job good = make_job(&file, &memory, DMB_READ, DMB_DIRECT), bad;
	struct dmb_batch *batch;

	context("invalid jobs", 0);
#define CHECK_INVALID(field, value)                                                                \
	do {                                                                                       \
		bad = good;                                                                        \
		bad.field = (value);                                                               \
		CHECK_EQUAL(dmb_batch_create(ring, &bad, NULL, 0, &batch), -EINVAL);               \
	} while (0)
	CHECK_INVALID(depth, 0);
	CHECK_INVALID(block, 0);
	CHECK_INVALID(block, good.offset_align + 1);
	CHECK_INVALID(offset_align, 0);
	CHECK_INVALID(offset_align, 768);
	CHECK_INVALID(memory_align, 0);
	CHECK_INVALID(page, 0);
	CHECK_INVALID(slots, (int32_t *)&bad);
	CHECK_EQUAL(dmb_batch_create(ring, &good, NULL, 0, &batch), 0);
	CHECK_EQUAL(dmb_batch_run(batch, 0), 0);
	dmb_batch_destroy(batch);
	dmb_batch_destroy(NULL);
}

static void test(struct dmb_ring *ring)
{
	if (!file_open(&file, FILE_SIZE))
		return;
	for (int route = DMB_DIRECT; route <= DMB_BUFFERED; route++) {
		for (int direction = DMB_READ; direction <= DMB_WRITE; direction++) {
			interrupt(ring, direction, route);
			failing_ring(ring, direction, route);
		}
	}
	early(ring);
	signals(ring);
	failing_waits(ring);
	cancelled(ring);
	a_signal(ring);
	stopped_before_an_edge(ring);
	invalid(ring);
	file_close(&file);
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
