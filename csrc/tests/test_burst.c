/* SPDX-License-Identifier: MIT */
/* How many requests are handled, submitted and waited for at a time. */
#include "test.h"

#include <unistd.h>

enum { DEPTH = 64, REQUESTS = 512, SIZE = REQUESTS * PAGE };

/*
 * A device in the place of a ring's: it completes nothing before all that it had is handled, and
 * then all that was submitted since.
 */
static struct {
	struct dmb_io *taken[DEPTH], *submitted[DEPTH], *complete[DEPTH];
	uint32_t taken_count, submitted_count, complete_count;
	uint32_t handled; /* since the last wait */
	uint32_t submissions;
	uint32_t first; /* the most handled of a burst before something was submitted */
	uint32_t block; /* what every request is of */
	bool workers;	/* what the job says */
} device;

static int burst_issue(struct dmb_ring *ring, struct dmb_io *io)
{
	(void)ring;
	CHECK_EQUAL(io->heavy, device.workers);
	CHECK_EQUAL(io->length, device.block);
	CHECK(device.taken_count < DEPTH);
	device.taken[device.taken_count++] = io;
	return 0;
}

static void submit(void)
{
	device.submissions += device.taken_count > 0;
	while (device.taken_count) {
		CHECK(device.submitted_count < DEPTH);
		device.submitted[device.submitted_count++] = device.taken[--device.taken_count];
	}
}

static void complete(void)
{
	while (device.submitted_count) {
		struct dmb_io *io = device.submitted[--device.submitted_count];

		io->result = (int32_t)dmb_lone(io->direction, io->fd, (uintptr_t)io->address,
					       io->length, io->offset);
		device.complete[device.complete_count++] = io;
	}
}

static uint32_t expected_count(uint32_t in_flight)
{
	uint32_t most = 65536 / device.block, count = in_flight / 8;

	if (!device.workers)
		return 1;
	count = count < most ? count : most;
	return count ? count : 1;
}

static int burst_wait(struct dmb_ring *ring, uint32_t count, int timeout_ms)
{
	bool fed = device.taken_count && !device.submitted_count;

	(void)timeout_ms;
	CHECK_EQUAL(count, expected_count(ring->in_flight));
	if (fed && device.handled > device.first)
		device.first = device.handled;
	device.handled = 0;
	submit();
	if (!device.complete_count)
		complete();
	CHECK(device.complete_count >= count);
	ring->ready = device.complete_count;
	return 0;
}

static struct dmb_io *burst_reap(struct dmb_ring *ring)
{
	(void)ring;
	if (!device.complete_count)
		return NULL;
	device.handled++;
	return device.complete[--device.complete_count];
}

static void run(struct dmb_ring *ring, struct file *file, struct memory *memory, uint32_t block,
		bool workers)
{
	struct dmb_job job = make_job(file, memory, DMB_READ, DMB_DIRECT);
	size_t count = SIZE / block;
	uint64_t segments[3 * REQUESTS];
	struct dmb_result result;

	job.depth = DEPTH;
	job.block = block;
	job.by_workers = workers;
	for (size_t i = 0; i < count; i++) {
		segments[3 * i] = (i * 37 % count) * block;
		segments[3 * i + 1] = i * block;
		segments[3 * i + 2] = block;
	}
	memset(memory->bytes, POISON, memory->size);
	result = transfer(ring, &job, segments, count);
	CHECK_EQUAL(result.error, 0);
	CHECK_EQUAL(result.nbytes, SIZE);
	CHECK_EQUAL(result.requests, count);
	check_moved(file, memory, segments, count, DMB_READ, SIZE, true);
}

static void bursts(struct file *file, struct memory *memory)
{
	static const struct dmb_backend_ops ops = {
		.issue = burst_issue,
		.wait = burst_wait,
		.reap = burst_reap,
	};
	const struct dmb_backend_ops *real;
	struct dmb_ring *ring;

	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_THREADS, 0, 0, &ring), 0);
	real = ring->ops;
	ring->ops = &ops;
	for (unsigned round = 0; round < 8; round++) {
		memset(&device, 0, sizeof(device));
		context("bursts", round);
		device.workers = round & 1;
		device.block = PAGE << (round & 6);
		run(ring, file, memory, device.block, device.workers);
		if (device.block != PAGE)
			continue;
		/* 64 at once; or 4, 8, 16, 32 and the last 4 of a burst */
		CHECK_EQUAL(device.first, device.workers ? DEPTH : 4);
		CHECK(device.submissions <= REQUESTS / DEPTH * (device.workers ? 1 : 6));
	}
	ring->ops = real;
	dmb_ring_destroy(ring);
}

static void test(struct dmb_ring *ring)
{
	struct memory memory;
	struct file file;

	if (!file_open(&file, SIZE))
		return;
	memory_map(&memory, SIZE);
	context("bursts", 0);
	bursts(&file, &memory);
	for (unsigned round = 0; round < 4; round++) {
		context("each ring", round);
		run(ring, &file, &memory, PAGE << (2 * (round / 2)), round & 1);
	}
	memory_unmap(&memory);
	file_close(&file);
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
