/* SPDX-License-Identifier: MIT */
/* dmb_job_measure and dmb_segments_join: what is refused, and what an array comes to. */
#include <sys/eventfd.h>
#include <unistd.h>

#include "test.h"

enum { SIZE = 16 * PAGE, FILE_SIZE = 10 * PAGE + 100 };

static struct file file;
static struct memory memory;

static struct dmb_job job_of(int direction)
{
	struct dmb_job job = make_job(&file, &memory, direction, DMB_DIRECT);

	job.offset_align = job.memory_align = 512;
	job.slab_size = SIZE;
	return job;
}

static void check(int direction, int rc, size_t index, size_t count, const uint64_t *segments)
{
	struct dmb_job job = job_of(direction);
	struct dmb_measure measure;

	CHECK_EQUAL(dmb_job_measure(&job, segments, count, &measure), rc);
	if (rc)
		CHECK_EQUAL(measure.bad, index);
}

#define CHECK_SEGMENTS(direction, rc, index, ...)                                                  \
	do {                                                                                       \
		const uint64_t segments_[] = {__VA_ARGS__};                                        \
		check(direction, rc, index, sizeof(segments_) / 24, segments_);                    \
	} while (0)

static void ranges(int direction)
{
	const uint64_t last = INT64_MAX;

	context("ranges", (unsigned)direction);
	check(direction, 0, 0, 0, NULL);
	CHECK_SEGMENTS(direction, 0, 0, 0, 0, SIZE);
	CHECK_SEGMENTS(direction, 0, 0, last, 0, 0);
	CHECK_SEGMENTS(direction, 0, 0, last - SIZE, 0, SIZE);
	CHECK_SEGMENTS(direction, 0, 0, 0, SIZE, 0);
	CHECK_SEGMENTS(direction, -ERANGE, 0, 0, 0, SIZE + 1);
	CHECK_SEGMENTS(direction, -ERANGE, 0, 0, SIZE + 1, 0);
	CHECK_SEGMENTS(direction, -ERANGE, 0, 0, UINT64_MAX, 2);
	CHECK_SEGMENTS(direction, -ERANGE, 0, 0, 2, UINT64_MAX);
	CHECK_SEGMENTS(direction, -ERANGE, 0, last + 1, 0, 0);
	CHECK_SEGMENTS(direction, -ERANGE, 0, UINT64_MAX, 0, 1);
	CHECK_SEGMENTS(direction, -ERANGE, 0, last - SIZE + 1, 0, SIZE);
	CHECK_SEGMENTS(direction, -ERANGE, 2, 0, 0, 1, 1, 0, 1, 2, SIZE, 1);
}

static void overlaps(void)
{
	context("overlaps", 0);
	CHECK_SEGMENTS(DMB_WRITE, 0, 0, 0, 0, 10, 10, 0, 10, 20, 0, 10);
	CHECK_SEGMENTS(DMB_WRITE, 0, 0, 20, 0, 10, 10, 0, 10, 0, 0, 10);
	CHECK_SEGMENTS(DMB_WRITE, -EEXIST, 1, 0, 0, 10, 9, 0, 10, 20, 0, 10);
	CHECK_SEGMENTS(DMB_WRITE, -EEXIST, 2, 20, 0, 10, 0, 0, 10, 9, 0, 10);
	CHECK_SEGMENTS(DMB_WRITE, -EEXIST, 1, 100, 0, 100, 0, 0, 150);
	CHECK_SEGMENTS(DMB_WRITE, -EEXIST, 1, 5, 0, 1, 5, 0, 1);
	/* one that lies within another, not beside it in the order */
	CHECK_SEGMENTS(DMB_WRITE, -EEXIST, 1, 0, 0, 100, 10, 0, 1, 200, 0, 1);
	/* an empty one overlaps nothing */
	CHECK_SEGMENTS(DMB_WRITE, 0, 0, 0, 0, 10, 5, 0, 0, 10, 0, 10);
	CHECK_SEGMENTS(DMB_WRITE, 0, 0, 10, 0, 10, 15, 0, 0, 0, 0, 10);
	CHECK_SEGMENTS(DMB_WRITE, -EEXIST, 2, 0, 0, 10, 5, 0, 0, 9, 0, 10);
	/* reading the same bytes twice is fine */
	CHECK_SEGMENTS(DMB_READ, 0, 0, 0, 0, 10, 5, 10, 10);
}

static void joins(void)
{
	const uint64_t segments[] = {
		0,  100, 10,		 /* the next one continues it in both */
		10, 110, 10, 0,	 0,   0, /* and one without bytes is left out */
		20, 120, 5,  25, 200, 5, /* in the file only */
		40, 205, 5,		 /* in the buffer only */
		35, 200, 5,		 /* before it */
		40, 205, 5,
	};
	const uint64_t expected[] = {0, 100, 25, 25, 200, 5, 40, 205, 5, 35, 200, 10};
	struct dmb_job job = job_of(DMB_READ);
	struct dmb_measure measure;
	uint64_t joined[12];

	context("joins", 0);
	CHECK_EQUAL(dmb_job_measure(&job, segments, 8, &measure), 0);
	CHECK_EQUAL(measure.joined, 4);
	CHECK_EQUAL(measure.count, 7);
	CHECK_EQUAL(measure.nbytes, 45);
	dmb_segments_join(segments, 8, joined);
	CHECK(!memcmp(joined, expected, sizeof(expected)));
	CHECK_EQUAL(dmb_job_measure(&job, segments + 6, 1, &measure), 0);
	CHECK_EQUAL(measure.joined, 0);
	dmb_segments_join(segments + 6, 1, joined);
	dmb_segments_join(NULL, 0, NULL);
}

static struct dmb_measure measured(const struct dmb_job *job, const uint64_t *segments,
				   size_t count)
{
	struct dmb_measure measure;

	CHECK_EQUAL(dmb_job_measure(job, segments, count, &measure), 0);
	return measure;
}

static void bounds(void)
{
	const uint64_t segments[] = {3 * PAGE, PAGE, 512, 0, 0, 0, PAGE, 5 * PAGE, PAGE};
	struct dmb_job job = job_of(DMB_READ);
	struct dmb_measure measure = measured(&job, segments, 3);

	context("bounds", 0);
	CHECK_EQUAL(measure.file_size, FILE_SIZE);
	CHECK_EQUAL(measure.file_start, PAGE);
	CHECK_EQUAL(measure.file_end, 3 * PAGE + 512);
	CHECK_EQUAL(measure.buffer_start, PAGE);
	CHECK_EQUAL(measure.buffer_end, 6 * PAGE);
	measure = measured(&job, segments + 3, 1);
	CHECK_EQUAL(measure.file_end | measure.buffer_end | measure.count, 0);
}

static void fits(void)
{
	static const struct {
		int direction;
		uint64_t segment[3];
		uint64_t without, edges, staged_without;
	} cases[] = {
		{DMB_READ, {0, 0, 4 * PAGE}, 0, 0, 0},
		{DMB_READ, {512, 512, 512}, 0, 0, 0},
		{DMB_READ, {1, 1, 4 * PAGE}, 0, 1, 0},
		{DMB_READ, {1, 0, 4 * PAGE}, 1, 1, 0},
		{DMB_READ, {10 * PAGE, 0, 100}, 1, 1, 0}, /* the block that holds the end */
		{DMB_READ, {9 * PAGE, 0, 2 * PAGE}, 0, 1, 0},
		{DMB_WRITE, {512, 512, 512}, 0, 0, 0},
		{DMB_WRITE, {1, 1, PAGE}, 1, 1, 1},
		{DMB_WRITE, {1, 1, 2 * PAGE}, 0, 1, 0},
		{DMB_WRITE, {PAGE, 1, PAGE}, 1, 1, 0},
	};

	for (unsigned i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct dmb_job job = job_of(cases[i].direction);
		struct dmb_measure measure = measured(&job, cases[i].segment, 1);

		context("fits", i);
		CHECK_EQUAL(measure.direct.without_straight, cases[i].without);
		CHECK_EQUAL(measure.direct.with_edges, cases[i].edges);
		CHECK_EQUAL(measure.native.without_straight, cases[i].without);
		CHECK_EQUAL(measure.staged.without_straight, cases[i].staged_without);
	}
}

/* A block that straddles two dma-bufs is an edge of the native route alone. */
static void slabs(void)
{
	const uint64_t segment[] = {0, PAGE, 4 * PAGE};
	struct dmb_job job = job_of(DMB_READ);
	struct dmb_measure measure;

	context("slabs", 0);
	job.slab_size = 2 * PAGE;
	CHECK_EQUAL(measured(&job, segment, 1).native.with_edges, 0);
	job.slab_size = 2 * PAGE + 256;
	measure = measured(&job, segment, 1);
	CHECK_EQUAL(measure.native.with_edges, 1);
	CHECK_EQUAL(measure.direct.with_edges, 0);
}

static void alignment(void)
{
	const uint64_t segment[] = {0, 4, 4 * PAGE};
	struct dmb_job job = job_of(DMB_READ);

	context("alignment", 0);
	job.memory_align = 4;
	CHECK_EQUAL(measured(&job, segment, 1).off_block, 1);
	job.memory_align = 512;
	CHECK_EQUAL(measured(&job, segment, 1).off_block, 0);
}

/* An eventfd is readable when it was written to: a dma-buf whose fences have signalled. */
static void fences(void)
{
	const uint64_t segment[] = {0, 0, PAGE}, empty[] = {0, 0, 0};
	int32_t fd = eventfd(0, EFD_CLOEXEC);
	struct dmb_job job = job_of(DMB_WRITE);

	context("fences", 0);
	job.slabs = &fd;
	CHECK_EQUAL(measured(&job, segment, 1).in_use, 1);
	CHECK_EQUAL(measured(&job, empty, 1).in_use, 0);
	eventfd_write(fd, 1);
	CHECK_EQUAL(measured(&job, segment, 1).in_use, 0);
	close(fd);
}

static void namespaces(void)
{
	const uint64_t part[] = {0, 0, 4096, 4096, 0, 512}, whole[] = {0, 0, 4096};
	struct dmb_job job = job_of(DMB_WRITE);
	struct dmb_measure measure;

	context("namespaces", 0);
	job.nsid = 1;
	job.offset_align = 4096;
	job.plain_fd = -1;
	job.file_size = 1 << 20;
	CHECK_EQUAL(dmb_job_measure(&job, part, 2, &measure), -EINVAL);
	CHECK_EQUAL(measure.bad, 1);
	CHECK_EQUAL(measured(&job, whole, 1).file_size, 1 << 20);
	job.direction = DMB_READ;
	CHECK_EQUAL(measured(&job, part, 2).count, 2);
	job.nsid = 0;
	CHECK_EQUAL(dmb_job_measure(&job, whole, 1, &measure), -EBADF);
}

int main(void)
{
	if (!file_open(&file, FILE_SIZE))
		return finish();
	memory_map(&memory, SIZE);
	joins();
	bounds();
	fits();
	slabs();
	alignment();
	fences();
	namespaces();
	ranges(DMB_READ);
	ranges(DMB_WRITE);
	overlaps();
	memory_unmap(&memory);
	file_close(&file);
	return finish();
}
