/* SPDX-License-Identifier: MIT */
/* Lone requests by a lane: what it takes, every byte, and what it leaves to the long way. */
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "test.h"

enum { PAGES = 8 };

static void read_and_compare(const struct file *file, const struct memory *memory,
			     const struct dmb_lane *lane, uint64_t offset, uint64_t start,
			     uint64_t size)
{
	memset(memory->bytes, POISON, memory->size);
	CHECK_EQUAL(dmb_lane_move(lane, offset, start, size, 1), 1);
	CHECK(!memcmp(memory->bytes + start, file->bytes + offset, size));
	for (uint64_t i = 0; i < memory->size; i++)
		if (i < start || i >= start + size)
			CHECK_EQUAL(memory->bytes[i], POISON);
}

static void refused(const struct memory *memory, const struct dmb_lane *lane, uint64_t offset,
		    uint64_t start, uint64_t size)
{
	memset(memory->bytes, POISON, memory->size);
	CHECK_EQUAL(dmb_lane_move(lane, offset, start, size, 1), 0);
	for (uint64_t i = 0; i < memory->size; i++)
		CHECK_EQUAL(memory->bytes[i], POISON);
}

static void reads(struct file *file, struct memory *memory)
{
	struct dmb_lane lane = make_lane(file, memory, DMB_READ);

	for (unsigned round = 0; round < 64; round++) {
		uint64_t blocks = PAGES * PAGE / lane.unit, pages = PAGES;
		uint64_t start = random_below(pages) * PAGE, offset = random_below(blocks);
		uint64_t size = 1 + random_below((memory->size - start) / lane.unit);

		context("reads", round);
		if (size > blocks - offset)
			size = blocks - offset;
		read_and_compare(file, memory, &lane, offset * lane.unit, start, size * lane.unit);
	}
	refused(memory, &lane, 0, 0, 0);
	refused(memory, &lane, 0, 0, PAGE - 1);
	refused(memory, &lane, 1, 0, PAGE);
	refused(memory, &lane, 0, 1, PAGE);
	refused(memory, &lane, 0, memory->size, PAGE);
	refused(memory, &lane, 0, UINT64_MAX - PAGE + 1, PAGE);
	refused(memory, &lane, UINT64_MAX - PAGE + 1, 0, PAGE);
	refused(memory, &lane, PAGES * PAGE, 0, PAGE); /* the block that holds the end */
	lane.most = PAGE;
	refused(memory, &lane, 0, 0, 2 * PAGE);
	lane.fd = -1;
	refused(memory, &lane, 0, 0, PAGE);
	lane = make_lane(file, memory, DMB_READ);
	lane.base = 0;
	refused(memory, &lane, 0, 0, PAGE);
}

static void a_file_that_shrinks(struct file *file, struct memory *memory)
{
	struct dmb_lane lane = make_lane(file, memory, DMB_READ);

	read_and_compare(file, memory, &lane, 6 * PAGE, 0, 2 * PAGE);
	CHECK_EQUAL(ftruncate(file->plain, 7 * PAGE + 100), 0);
	refused(memory, &lane, 6 * PAGE, 0, 2 * PAGE);
	read_and_compare(file, memory, &lane, 6 * PAGE, 0, PAGE);
	lane.file_size = PAGES * PAGE; /* a device that became smaller gives a short count */
	CHECK_EQUAL(dmb_lane_move(&lane, 7 * PAGE, 0, PAGE, 1), 0);
}

static void writes(struct file *file, struct memory *memory)
{
	struct dmb_lane lane = make_lane(file, memory, DMB_WRITE);

	random_bytes(memory->bytes, memory->size);
	CHECK_EQUAL(dmb_lane_move(&lane, 2 * PAGE, PAGE, 3 * PAGE, 1), 1);
	memcpy(file->bytes + 2 * PAGE, memory->bytes + PAGE, 3 * PAGE);
	CHECK_EQUAL(dmb_lane_move(&lane, PAGES * PAGE, 0, PAGE, 1), 0); /* never makes it longer */
	CHECK_EQUAL(dmb_lane_move(&lane, 512, 0, PAGE, 1), 0);
	file_check(file);
}

/* An eventfd is readable when it was written to, and writable: a dma-buf's fences in one number. */
static void fences(struct file *file, struct memory *memory)
{
	struct dmb_lane lane = make_lane(file, memory, DMB_WRITE);
	int32_t fds[2] = {eventfd(0, EFD_CLOEXEC), eventfd(0, EFD_CLOEXEC)};

	lane.slabs = fds;
	lane.slab_size = memory->size / 2;
	CHECK_EQUAL(dmb_lane_move(&lane, 0, 0, PAGE, 1), 0); /* its writers are not done */
	CHECK_EQUAL(dmb_lane_move(&lane, 0, 0, PAGE, 0), 1);
	eventfd_write(fds[1], 1);
	CHECK_EQUAL(dmb_lane_move(&lane, 0, 0, PAGE, 1), 0);
	CHECK_EQUAL(dmb_lane_move(&lane, 0, lane.slab_size, PAGE, 1), 1);
	eventfd_write(fds[0], 1);
	CHECK_EQUAL(dmb_lane_move(&lane, 0, 0, PAGE, 1), 1);
	CHECK_EQUAL(dmb_lane_move(&lane, 0, lane.slab_size - PAGE, 2 * PAGE, 1), 0);
	close(fds[0]);
	CHECK_EQUAL(dmb_lane_move(&lane, 0, 0, PAGE, 1), 0);
	close(fds[1]);
}

int main(void)
{
	struct memory memory;
	struct file file;

	if (!file_open(&file, PAGES * PAGE + 100))
		return finish();
	memory_map(&memory, PAGES * PAGE);
	reads(&file, &memory);
	a_file_that_shrinks(&file, &memory);
	file_close(&file);
	if (!file_open(&file, PAGES * PAGE + 100))
		return finish();
	writes(&file, &memory);
	fences(&file, &memory);
	file_close(&file);
	memory_unmap(&memory);
	return finish();
}
