/* SPDX-License-Identifier: MIT */
/* Random segments on every route, in both directions: every byte against pread and pwrite. */
#include "test.h"

#include <unistd.h>

enum { FILE_SIZE = 150000, MEMORY = 36 * PAGE, SEGMENTS = 6, ROUNDS = 8 };

static uint64_t total_of(const uint64_t *segments, size_t count)
{
	uint64_t total = 0;

	for (size_t i = 0; i < count; i++)
		total += segments[3 * i + 2];
	return total;
}

static void check_result(const struct dmb_result *result, uint64_t nbytes, int64_t short_segment)
{
	CHECK_EQUAL(result->error, 0);
	CHECK_EQUAL(result->nbytes, nbytes);
	CHECK_EQUAL(result->short_segment, short_segment);
	CHECK_EQUAL(result->reissues, 0);
	CHECK(result->straight + result->copied >= nbytes);
	if (short_segment < 0)
		CHECK_EQUAL(result->straight + result->copied, nbytes);
}

/* The first position past the file's end, and the index of its segment. */
static uint64_t end_of_file(const struct file *file, const uint64_t *segments, size_t count,
			    int64_t *index)
{
	uint64_t position = 0;

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;

		if (segment[2] && segment[0] + segment[2] > file->size) {
			*index = (int64_t)i;
			return position + (segment[0] < file->size ? file->size - segment[0] : 0);
		}
		position += segment[2];
	}
	*index = -1;
	return position;
}

static void reads(struct dmb_ring *ring, int route, uint64_t beyond)
{
	uint64_t segments[3 * SEGMENTS];
	struct memory memory;
	struct file file;

	if (!file_open(&file, FILE_SIZE + random_near(2 * PAGE, 512)))
		return;
	memory_map(&memory, MEMORY);
	for (unsigned round = 0; round < ROUNDS; round++) {
		struct dmb_job job = make_job(&file, &memory, DMB_READ, route);
		size_t count = random_below(SEGMENTS + 1);
		struct dmb_result result;
		int64_t index;
		uint64_t end;

		context(beyond ? "reads past the end" : "reads", round);
		random_segments(segments, count, file.size + beyond, memory.size, DMB_READ);
		memset(memory.bytes, POISON, memory.size);
		end = end_of_file(&file, segments, count, &index);
		result = transfer(ring, &job, segments, count);
		check_result(&result, end, index);
		CHECK(route == DMB_DIRECT || !result.straight);
		check_moved(&file, &memory, segments, count, DMB_READ, end, false);
	}
	file_check(&file);
	memory_unmap(&memory);
	file_close(&file);
}

static void writes(struct dmb_ring *ring, int route)
{
	uint64_t segments[3 * SEGMENTS];
	struct memory memory;
	struct file file;

	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	random_bytes(memory.bytes, memory.size);
	for (unsigned round = 0; round < ROUNDS; round++) {
		struct dmb_job job = make_job(&file, &memory, DMB_WRITE, route);
		size_t count = random_below(SEGMENTS + 1);
		struct dmb_result result;

		context("writes", round);
		random_segments(segments, count, file.size, memory.size, DMB_WRITE);
		result = transfer(ring, &job, segments, count);
		check_result(&result, total_of(segments, count), -1);
		check_moved(&file, &memory, segments, count, DMB_WRITE, result.nbytes, false);
	}
	memory_unmap(&memory);
	file_close(&file);
}

/* A file that grows under the write ends where the last segment does. */
static void growth(struct dmb_ring *ring, int route)
{
	struct memory memory;
	struct file file;

	if (!file_open(&file, 0))
		return;
	memory_map(&memory, MEMORY);
	random_bytes(memory.bytes, memory.size);
	for (unsigned round = 0; round < 10; round++) {
		struct dmb_job job = make_job(&file, &memory, DMB_WRITE, route);
		uint64_t segment[3] = {0, 0, random_near(MEMORY, 512)};

		context("growth", round);
		CHECK_EQUAL(ftruncate(file.plain, 0), 0);
		free(file.bytes);
		file.bytes = calloc(1, segment[2] + 1);
		file.size = segment[2];
		CHECK_EQUAL(transfer(ring, &job, segment, 1).nbytes, segment[2]);
		check_moved(&file, &memory, segment, 1, DMB_WRITE, segment[2], false);
	}
	memory_unmap(&memory);
	file_close(&file);
}

/* An aligned segment goes straight, all of it but the edges. */
static void aligned(struct dmb_ring *ring)
{
	uint64_t segment[3] = {PAGE, 2 * PAGE, 20 * PAGE}, ragged[3] = {100, 100, 10 * PAGE};
	struct memory memory;
	struct file file;

	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	memset(memory.bytes, POISON, memory.size);
	for (int direction = DMB_READ; direction <= DMB_WRITE; direction++) {
		struct dmb_job job = make_job(&file, &memory, direction, DMB_DIRECT);
		struct dmb_result result = transfer(ring, &job, segment, 1);

		context("aligned", (unsigned)direction);
		CHECK_EQUAL(result.straight, segment[2]);
		CHECK_EQUAL(result.copied, 0);
		result = transfer(ring, &job, ragged, 1);
		CHECK(result.copied < 2 * PAGE);
		CHECK_EQUAL(result.straight + result.copied, ragged[2]);
		job.route = DMB_STAGED;
		CHECK_EQUAL(transfer(ring, &job, segment, 1).copied, segment[2]);
	}
	memory_unmap(&memory);
	file_close(&file);
}

static void test(struct dmb_ring *ring)
{
	for (int route = DMB_DIRECT; route <= DMB_BUFFERED; route++) {
		reads(ring, route, 0);
		reads(ring, route, 3 * PAGE);
		writes(ring, route);
		growth(ring, route);
	}
	aligned(ring);
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
