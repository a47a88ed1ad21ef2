/* SPDX-License-Identifier: MIT */
/* Reads of a file from the device that holds it: scattered extents, holes, the end of the file. */
#include "test.h"

#include <unistd.h>

enum { DEVICE_SIZE = 96 * PAGE, MEMORY = 36 * PAGE, BLOCKS = 64, SEGMENTS = 6, ROUNDS = 12 };

/* A file of at most BLOCKS blocks, somewhere on a device. */
struct layout {
	struct file file; /* its bytes and size only */
	struct dmb_extent extents[BLOCKS];
	size_t count;
};

/* Place runs of blocks in random order, about a third of them holes. */
static void layout_make(struct layout *layout, const struct file *device)
{
	uint64_t order[BLOCKS], block = 0;

	for (uint64_t i = 0; i < BLOCKS; i++)
		order[i] = i;
	for (uint64_t i = BLOCKS; i > 1; i--) {
		uint64_t j = random_below(i), swap = order[i - 1];

		order[i - 1] = order[j];
		order[j] = swap;
	}
	layout->file.size = (BLOCKS - 1) * PAGE - random_below(3) * 512 - random_below(2) * 77;
	layout->file.bytes = calloc(1, BLOCKS * PAGE);
	CHECK(layout->file.bytes);
	layout->count = 0;
	while (block < BLOCKS) {
		uint64_t run = 1 + random_below(4), place = order[block] * PAGE;
		uint64_t size = dmb_min(run, BLOCKS - block) * PAGE;

		if (random_below(3)) {
			layout->extents[layout->count++] =
				(struct dmb_extent){block * PAGE, place, size};
			memcpy(layout->file.bytes + block * PAGE, device->bytes + place, size);
		}
		block += run;
	}
}

static uint64_t moved(const struct layout *layout, const uint64_t *segments, size_t count,
		      int64_t *index)
{
	uint64_t position = 0;

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;

		if (segment[2] && segment[0] + segment[2] > layout->file.size) {
			*index = (int64_t)i;
			return position + (segment[0] < layout->file.size
						   ? layout->file.size - segment[0]
						   : 0);
		}
		position += segment[2];
	}
	*index = -1;
	return position;
}

static void reads(struct dmb_ring *ring, int route, uint64_t beyond)
{
	struct memory memory;
	struct file device;

	if (!file_open(&device, DEVICE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	for (unsigned round = 0; round < ROUNDS; round++) {
		struct dmb_job job = make_job(&device, &memory, DMB_READ, route);
		uint64_t segments[3 * SEGMENTS], nbytes;
		size_t count = 1 + random_below(SEGMENTS);
		struct dmb_result result;
		struct layout layout;
		int64_t index;

		context(beyond ? "past the end" : "reads", round);
		layout_make(&layout, &device);
		job.file_size = layout.file.size;
		job.extents = layout.extents;
		job.extent_count = layout.count;
		random_segments(segments, count, layout.file.size + beyond, memory.size, DMB_READ);
		memset(memory.bytes, POISON, memory.size);
		nbytes = moved(&layout, segments, count, &index);
		result = transfer(ring, &job, segments, count);
		CHECK_EQUAL(result.error, 0);
		CHECK_EQUAL(result.nbytes, nbytes);
		CHECK_EQUAL(result.short_segment, index);
		check_moved(&layout.file, &memory, segments, count, DMB_READ, nbytes, false);
		free(layout.file.bytes);
	}
	file_check(&device);
	memory_unmap(&memory);
	file_close(&device);
}

/* An extent that the device does not have all of: an error at the first byte that is missing. */
static void device_ends(struct dmb_ring *ring)
{
	const uint64_t segment[3] = {0, 0, 8 * PAGE};
	const struct dmb_extent extents[] = {
		{0, 4 * PAGE, 2 * PAGE},
		{2 * PAGE, DEVICE_SIZE - PAGE, 4 * PAGE},
	};
	struct dmb_result result;
	struct memory memory;
	struct file device;
	struct dmb_job job;

	context("the device ends", 0);
	if (!file_open(&device, DEVICE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	memset(memory.bytes, POISON, memory.size);
	job = make_job(&device, &memory, DMB_READ, DMB_DIRECT);
	job.file_size = 8 * PAGE;
	job.extents = extents;
	job.extent_count = 2;
	result = transfer(ring, &job, segment, 1);
	CHECK_EQUAL(result.error, ENODEV);
	CHECK_EQUAL(result.nbytes, 3 * PAGE);
	CHECK_EQUAL(result.error_offset, 3 * PAGE);
	CHECK_EQUAL(memcmp(memory.bytes, device.bytes + 4 * PAGE, 2 * PAGE), 0);
	CHECK_EQUAL(memcmp(memory.bytes + 2 * PAGE, device.bytes + DEVICE_SIZE - PAGE, PAGE), 0);
	memory_unmap(&memory);
	file_close(&device);
}

/* Zeros need the CPU; a write has no extents. */
static void refused(struct dmb_ring *ring)
{
	const uint64_t segment[3] = {0, 0, PAGE};
	const struct dmb_extent extent = {4 * PAGE, 0, PAGE};
	struct dmb_batch *batch;
	struct memory memory;
	struct file device;
	struct dmb_job job;

	context("refused", 0);
	if (!file_open(&device, DEVICE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	job = make_job(&device, &memory, DMB_READ, DMB_DIRECT);
	job.extents = &extent;
	job.extent_count = 1;
	job.base = 0;
	CHECK_EQUAL(transfer(ring, &job, segment, 1).error, EFAULT);
	job.direction = DMB_WRITE;
	CHECK_EQUAL(dmb_batch_create(ring, &job, segment, 1, &batch), -EINVAL);
	memory_unmap(&memory);
	file_close(&device);
}

static void test(struct dmb_ring *ring)
{
	for (int route = DMB_DIRECT; route <= DMB_STAGED; route++) {
		reads(ring, route, 0);
		reads(ring, route, 3 * PAGE);
	}
	device_ends(ring);
	refused(ring);
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
