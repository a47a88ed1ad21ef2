/* SPDX-License-Identifier: MIT */
/* Many batches on one ring at the same time, each with its own depth, block and route. */
#include "test.h"

enum { FILE_SIZE = 100000, MEMORY = 20 * PAGE, SEGMENTS = 3, BATCHES = 6, ROUNDS = 7 };

struct one {
	struct file file;
	struct memory memory;
	struct dmb_job job;
	uint64_t segments[3 * SEGMENTS];
	struct dmb_batch *batch;
	uint64_t total;
};

static bool begin(struct dmb_ring *ring, struct one *one)
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
	for (int i = 0; i < SEGMENTS; i++)
		one->total += one->segments[3 * i + 2];
	CHECK_EQUAL(dmb_batch_create(ring, &one->job, one->segments, SEGMENTS, &one->batch), 0);
	return true;
}

static void end(struct one *one, bool drained)
{
	struct dmb_result result;

	dmb_batch_drain(one->batch);
	dmb_batch_get_result(one->batch, &result);
	dmb_batch_destroy(one->batch);
	one->batch = NULL;
	CHECK_EQUAL(result.error, 0);
	CHECK_EQUAL(result.short_segment, -1);
	if (!drained)
		CHECK_EQUAL(result.nbytes, one->total);
	check_moved(&one->file, &one->memory, one->segments, SEGMENTS, one->job.direction,
		    result.nbytes, false);
	memory_unmap(&one->memory);
	file_close(&one->file);
}

static void together(struct dmb_ring *ring)
{
	struct one ones[BATCHES];

	for (int i = 0; i < BATCHES; i++)
		if (!begin(ring, &ones[i]))
			return;
	for (int left = BATCHES; left;) {
		struct one *one = &ones[random_below(BATCHES)];
		bool interrupted;

		if (!one->batch)
			continue;
		interrupted = !random_below(20);
		if (!interrupted && dmb_batch_run(one->batch, (int)random_below(2)) == 1)
			continue;
		end(one, interrupted);
		left--;
	}
}

/* One after the other, each with larger or smaller blocks than the one before. */
static void in_turn(struct dmb_ring *ring)
{
	static const struct {
		uint32_t depth, block;
	} sizes[] = {{2, PAGE}, {2, 16 * PAGE}, {16, PAGE}, {1, 64 * PAGE}, {300, 512}, {3, PAGE}};
	uint64_t most = 0;

	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		struct dmb_job job;
		struct one one;
		uint64_t size;

		context("in turn", (unsigned)i);
		if (!begin(ring, &one))
			return;
		dmb_batch_destroy(one.batch);
		job = make_job(&one.file, &one.memory, DMB_READ, DMB_STAGED);
		job.depth = sizes[i].depth;
		job.block = sizes[i].block;
		one.job = job;
		one.segments[0] = 1;
		one.segments[1] = 2;
		one.total = one.segments[2] = MEMORY - 3;
		one.segments[5] = one.segments[8] = 0;
		memset(one.memory.bytes, POISON, one.memory.size);
		CHECK_EQUAL(dmb_batch_create(ring, &one.job, one.segments, SEGMENTS, &one.batch),
			    0);
		while (dmb_batch_run(one.batch, 100) == 1)
			;
		end(&one, false);
		size = (uint64_t)job.depth * job.block;
		most = size > most ? size : most;
		CHECK(ring->stage.size >= size);
	}
	CHECK(ring->stage.size <= most || ring->stage.size <= 12 * 16 * PAGE);
}

static void test(struct dmb_ring *ring)
{
	in_turn(ring);
	for (unsigned round = 0; round < ROUNDS; round++) {
		context("together", round);
		together(ring);
		check_idle(ring);
	}
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
