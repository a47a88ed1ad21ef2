/* SPDX-License-Identifier: MIT */
/* dmb_segments_check: what is refused, and which segment it names. */
#include "test.h"

enum { SIZE = 1000 };

static void check(int direction, int rc, size_t index, size_t count, const uint64_t *segments)
{
	size_t at = SIZE_MAX;

	CHECK_EQUAL(dmb_segments_check(segments, count, SIZE, direction, &at), rc);
	if (rc)
		CHECK_EQUAL(at, index);
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
	uint64_t joined[24];

	context("joins", 0);
	CHECK_EQUAL(dmb_segments_join(segments, 8, NULL), 4);
	CHECK_EQUAL(dmb_segments_join(segments, 8, joined), 4);
	CHECK(!memcmp(joined, expected, sizeof(expected)));
	CHECK_EQUAL(dmb_segments_join(segments + 6, 1, joined), 0);
	CHECK_EQUAL(dmb_segments_join(NULL, 0, NULL), 0);
}

int main(void)
{
	joins();
	ranges(DMB_READ);
	ranges(DMB_WRITE);
	overlaps();
	return finish();
}
