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
} device;

static int burst_issue(struct dmb_ring *ring, struct dmb_io *io)
{
	(void)ring;
	CHECK(!io->async);
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

		io->result = (int32_t)dmb_read_write(io->direction, io->fd, (uintptr_t)io->address,
						     io->length, io->offset);
		device.complete[device.complete_count++] = io;
	}
}

static int burst_wait(struct dmb_ring *ring, int timeout_ms)
{
	bool fed = device.taken_count && !device.submitted_count;

	(void)timeout_ms;
	if (fed && device.handled > device.first)
		device.first = device.handled;
	device.handled = 0;
	submit();
	if (!device.complete_count)
		complete();
	CHECK(device.complete_count);
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

static void run(struct dmb_ring *ring, struct file *file, struct memory *memory, uint32_t block)
{
	struct dmb_job job = make_job(file, memory, DMB_READ, DMB_DIRECT);
	size_t count = SIZE / block;
	uint64_t segments[3 * REQUESTS];
	struct dmb_result result;

	job.depth = DEPTH;
	job.block = block;
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
	for (unsigned round = 0; round < 4; round++) {
		memset(&device, 0, sizeof(device));
		context("bursts", round);
		device.block = PAGE << (2 * round);
		run(ring, file, memory, device.block);
		if (device.block != PAGE)
			continue;
		/* 4, 8, 16, 32 and the last 4 of a burst */
		CHECK_EQUAL(device.first, 4);
		CHECK(device.submissions <= REQUESTS / DEPTH * 6);
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
	for (unsigned round = 0; round < 2; round++) {
		context("each ring", round);
		run(ring, &file, &memory, PAGE << (2 * round));
	}
	memory_unmap(&memory);
	file_close(&file);
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
