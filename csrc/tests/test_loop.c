/* SPDX-License-Identifier: MIT */
/* Many batches on one ring, driven as an event loop does: poll(2) on the eventfd, then a round. */
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "test.h"

enum {
	FILE_SIZE = 100000,
	MEMORY = 20 * PAGE,
	SEGMENTS = 3,
	BATCHES = 40,
	ROUNDS = 5,
	SMALL = 600
};

struct one {
	struct file file;
	struct memory memory;
	struct dmb_job job;
	uint64_t segments[3 * SEGMENTS];
	struct dmb_batch *batch;
	uint64_t total;
	bool stopped;
};

static bool begin(struct dmb_ring *ring, struct one *one, uint64_t tag)
{
	int direction = (int)random_below(2), route = DMB_DIRECT + (int)random_below(3);

	if (!file_open(&one->file, FILE_SIZE))
		return false;
	memory_map(&one->memory, MEMORY);
	random_bytes(one->memory.bytes, one->memory.size);
	if (direction == DMB_READ)
		memset(one->memory.bytes, POISON, one->memory.size);
	one->job = make_job(&one->file, &one->memory, direction, route);
	random_segments(one->segments, SEGMENTS, FILE_SIZE, MEMORY, direction);
	one->total = 0;
	one->stopped = false;
	for (int i = 0; i < SEGMENTS; i++)
		one->total += one->segments[3 * i + 2];
	CHECK_EQUAL(dmb_batch_create(ring, &one->job, one->segments, SEGMENTS, &one->batch), 0);
	dmb_batch_start(one->batch, tag);
	return true;
}

static void end(struct one *one)
{
	struct dmb_result result;

	dmb_batch_get_result(one->batch, &result);
	CHECK_EQUAL(dmb_batch_nbytes(one->batch), result.nbytes);
	dmb_batch_destroy(one->batch);
	one->batch = NULL;
	CHECK_EQUAL(result.error, 0);
	CHECK_EQUAL(result.short_segment, -1);
	if (!one->stopped)
		CHECK_EQUAL(result.nbytes, one->total);
	check_moved(&one->file, &one->memory, one->segments, SEGMENTS, one->job.direction,
		    result.nbytes, false);
	memory_unmap(&one->memory);
	file_close(&one->file);
}

static void end_told(struct one *ones, const struct dmb_done *done)
{
	CHECK_EQUAL(done->nbytes, dmb_batch_nbytes(ones[done->tag].batch));
	end(&ones[done->tag]);
}

/* What the loop does: wait until there is something to see, and see it. */
static void poll_once(struct dmb_ring *ring, int fd, struct dmb_done *done, uint32_t capacity,
		      uint32_t *count)
{
	struct pollfd ready = {.fd = fd, .events = POLLIN};
	eventfd_t value;

	CHECK_EQUAL(poll(&ready, 1, 30000), 1); /* or it was never signalled */
	CHECK_EQUAL(eventfd_read(fd, &value), 0);
	CHECK_EQUAL(dmb_ring_poll(ring, done, capacity, count), 0);
	CHECK(ring->in_flight <= (ring->info.depth ? ring->info.depth : 1));
}

static void together(struct dmb_ring *ring, int fd, bool stopping)
{
	struct one ones[BATCHES];
	struct dmb_done done[7];
	uint32_t count = 0;

	for (int i = 0; i < BATCHES; i++)
		if (!begin(ring, &ones[i], (uint64_t)i))
			return;
	CHECK_EQUAL(dmb_ring_poll(ring, done, 7, &count), 0);
	for (int left = BATCHES; left;) {
		struct one *victim = &ones[random_below(BATCHES)];

		while (count == 7) { /* as many as were asked for: there may be more */
			for (; count; left--)
				end_told(ones, &done[--count]);
			CHECK_EQUAL(dmb_ring_poll(ring, done, 7, &count), 0);
		}
		for (; count; left--)
			end_told(ones, &done[--count]);
		if (stopping && victim->batch && !random_below(4)) {
			victim->stopped = true;
			if (random_below(2)) {
				dmb_batch_stop(victim->batch);
			} else { /* the last resort, which is not reported */
				dmb_batch_drain(victim->batch);
				end(victim);
				left--;
			}
			eventfd_write(fd, 1);
		}
		if (left)
			poll_once(ring, fd, done, 7, &count);
	}
	CHECK_EQUAL(ring->in_flight, 0);
	CHECK(!ring->runnable.first && !ring->waiting.first && !ring->done.first);
}

/* Far more than the ring has room for, submitted by as few system calls as there are rounds. */
static void small(struct dmb_ring *ring, int fd)
{
	static struct dmb_batch *batches[SMALL];
	struct dmb_done done[SMALL];
	struct memory memory;
	uint32_t count = 0;
	struct dmb_job job;
	struct file file;
	uint64_t tags = 0;
	uint64_t blocks = FILE_SIZE / PAGE;

	if (!file_open(&file, FILE_SIZE))
		return;
	blocks = FILE_SIZE / PAGE;
	memory_map(&memory, SMALL * PAGE);
	memset(memory.bytes, POISON, memory.size);
	job = make_job(&file, &memory, DMB_READ, DMB_DIRECT);
	for (int i = 0; i < SMALL; i++)
		CHECK_EQUAL(dmb_job_start_small(ring, &job, (uint64_t)(i % blocks) * PAGE,
						(uint64_t)i * PAGE, PAGE, 1, (uint64_t)i,
						&batches[i]),
			    0);
	CHECK_EQUAL(ring->in_flight, 0); /* nothing is submitted before the poll */
	CHECK_EQUAL(dmb_ring_poll(ring, done, SMALL, &count), 0);
	while (count < SMALL)
		poll_once(ring, fd, done, SMALL, &count);
	for (int i = 0; i < SMALL; i++) {
		CHECK_EQUAL(done[i].nbytes, PAGE);
		tags += done[i].tag;
		dmb_batch_destroy(batches[i]);
		CHECK(!memcmp(memory.bytes + (uint64_t)i * PAGE,
			      file.bytes + (uint64_t)(i % blocks) * PAGE, PAGE));
	}
	CHECK_EQUAL(tags, SMALL * (SMALL - 1) / 2); /* each is reported once */
	memory_unmap(&memory);
	file_close(&file);
}

/* Edges, the end of the file and memory outside the buffer need more than one request. */
static void not_small(struct dmb_ring *ring)
{
	const uint64_t ranges[][3] = {
		{1, 0, PAGE},
		{0, 0, PAGE - 1},
		{0, 1, PAGE},
		{0, MEMORY, PAGE},
		{0, 0, 2 << 20},
		{0, 0, 0},
		{FILE_SIZE / PAGE * PAGE, 0, PAGE},
	};
	struct dmb_batch *batch = NULL;
	struct memory memory;
	struct dmb_job job;
	struct file file;

	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	job = make_job(&file, &memory, DMB_READ, DMB_DIRECT);
	for (size_t i = 0; i < sizeof(ranges) / sizeof(*ranges); i++)
		CHECK_EQUAL(dmb_job_start_small(ring, &job, ranges[i][0], ranges[i][1],
						ranges[i][2], 1, 1, &batch),
			    -EOPNOTSUPP);
	CHECK(!batch);
	memory_unmap(&memory);
	file_close(&file);
}

/* A copy of 64 KiB and more is made by a thread of the kernel, not while it is submitted. */
static void large(struct dmb_ring *ring, int fd)
{
	uint64_t segment[3] = {1, 7, 18 * PAGE};
	struct dmb_done done[1];
	struct dmb_result result;
	struct dmb_batch *batch;
	struct memory memory;
	struct dmb_job job;
	struct file file;
	uint32_t count = 0;

	context("large", 0);
	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	memset(memory.bytes, POISON, memory.size);
	job = make_job(&file, &memory, DMB_READ, DMB_BUFFERED);
	job.block = MEMORY;
	CHECK_EQUAL(dmb_batch_create(ring, &job, segment, 1, &batch), 0);
	dmb_batch_start(batch, 5);
	eventfd_write(fd, 1);
	while (!count)
		poll_once(ring, fd, done, 1, &count);
	dmb_batch_get_result(batch, &result);
	dmb_batch_destroy(batch);
	CHECK_EQUAL(result.error, 0);
	CHECK_EQUAL(result.nbytes, segment[2]);
	CHECK_EQUAL(result.requests, 1);
	CHECK(!memcmp(memory.bytes + 7, file.bytes + 1, segment[2]));
	CHECK_EQUAL(memory.bytes[6], POISON);
	CHECK_EQUAL(memory.bytes[7 + segment[2]], POISON);
	memory_unmap(&memory);
	file_close(&file);
}

static void test(struct dmb_ring *ring)
{
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	CHECK(fd >= 0);
	CHECK_EQUAL(dmb_ring_set_eventfd(ring, fd), 0);
	context("small", 0);
	small(ring, fd);
	not_small(ring);
	large(ring, fd);
	check_idle(ring);
	for (unsigned round = 0; round < ROUNDS; round++) {
		context("together", round);
		together(ring, fd, round > 0);
		check_idle(ring);
	}
	CHECK_EQUAL(dmb_ring_set_eventfd(ring, -1), 0);
	close(fd);
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
