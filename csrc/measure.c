/* SPDX-License-Identifier: MIT */
/* Measuring an array of segments before a transfer is planned. */
#include <errno.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include "internal.h"

static int by_file_offset(const void *a, const void *b)
{
	const uint64_t *left = *(const uint64_t *const *)a, *right = *(const uint64_t *const *)b;

	return left[0] < right[0] ? -1 : left[0] > right[0];
}

static int check_overlap(const uint64_t *segments, size_t count, uint64_t *ret)
{
	const uint64_t **order = malloc((count ? count : 1) * sizeof(*order));
	size_t used = 0;
	int rc = 0;

	if (!order)
		return -ENOMEM;
	for (size_t i = 0; i < count; i++)
		if (segments[3 * i + 2])
			order[used++] = segments + 3 * i;
	qsort(order, used, sizeof(*order), by_file_offset);
	for (size_t i = 1; i < used && !rc; i++) {
		const uint64_t *later = order[i - 1] > order[i] ? order[i - 1] : order[i];

		if (order[i - 1][0] + order[i - 1][2] <= order[i][0])
			continue;
		*ret = (uint64_t)(later - segments) / 3;
		rc = -EEXIST;
	}
	free(order);
	return rc;
}

static int check_ranges(const struct dmb_job *job, const uint64_t *segments, size_t count,
			struct dmb_measure *ret)
{
	const uint64_t blocks = job->nsid ? job->offset_align - 1 : 0;
	bool ascending = true;
	uint64_t end = 0;

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;

		ret->bad = i;
		if (segment[2] > job->size || segment[1] > job->size - segment[2])
			return -ERANGE;
		if (segment[0] > INT64_MAX || segment[2] > INT64_MAX - segment[0])
			return -ERANGE;
		if (!segment[2])
			continue;
		if (job->direction == DMB_WRITE && (segment[0] | segment[2]) & blocks)
			return -EINVAL;
		ascending = ascending && segment[0] >= end;
		end = segment[0] + segment[2];
	}
	ret->bad = 0;
	if (job->direction == DMB_READ || ascending)
		return 0;
	return check_overlap(segments, count, &ret->bad);
}

static bool continues(const uint64_t *segment, const uint64_t *before)
{
	return segment[0] == before[0] + before[2] && segment[1] == before[1] + before[2];
}

void dmb_segments_join(const uint64_t *segments, size_t count, uint64_t *ret)
{
	uint64_t *last = NULL;

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;

		if (!segment[2])
			continue;
		if (last && continues(segment, last)) {
			last[2] += segment[2];
			continue;
		}
		last = last ? last + 3 : ret;
		memcpy(last, segment, 3 * sizeof(*last));
	}
}

static void add_bounds(const uint64_t *segment, struct dmb_measure *ret)
{
	uint64_t file_end = segment[0] + segment[2], buffer_end = segment[1] + segment[2];

	if (!ret->count++) {
		ret->file_start = segment[0];
		ret->buffer_start = segment[1];
	}
	ret->nbytes += segment[2];
	ret->file_start = dmb_min(ret->file_start, segment[0]);
	ret->file_end = dmb_max(ret->file_end, file_end);
	ret->buffer_start = dmb_min(ret->buffer_start, segment[1]);
	ret->buffer_end = dmb_max(ret->buffer_end, buffer_end);
}

static bool without_straight(const struct dmb_job *job, const uint64_t *segment)
{
	struct dmb_io io = {0};
	uint64_t end, staged;

	dmb_middle(job, segment, &io.skip, &end);
	io.left = end > io.skip ? end - io.skip : 0;
	if (job->route == DMB_STAGED)
		return !io.left;
	return !dmb_straight_bytes(job, segment, &io, &staged);
}

static bool with_edges(const struct dmb_job *job, const uint64_t *segment)
{
	struct dmb_io io = {.left = segment[2]};
	uint64_t start, end, staged, room;

	dmb_middle(job, segment, &start, &end);
	if (start || end != segment[2] || dmb_straight_bytes(job, segment, &io, &staged) != end)
		return true;
	if (job->route != DMB_NATIVE)
		return false;
	room = job->slot_size - segment[1] % job->slot_size;
	return end > room && room % job->offset_align;
}

static uint32_t shared_pages(const struct dmb_job *job, const uint64_t *segment)
{
	uint64_t ends = segment[0] | (segment[0] + segment[2]);

	if (job->direction == DMB_READ || !(ends & (job->page - 1)))
		return 0;
	return ends & (job->offset_align - 1) ? DMB_SHARED_CACHED : DMB_SHARED_DIRECT;
}

static void fit(struct dmb_job *job, int route, const uint64_t *segment, struct dmb_fit *ret)
{
	job->route = route;
	ret->without_straight += without_straight(job, segment);
	ret->with_edges += with_edges(job, segment);
}

/* What makes a segment consist of whole blocks: see is_whole. */
struct blocks {
	uint64_t mask;	   /* bits of an offset or a size that lie inside a block */
	uint64_t file_end; /* the end of the file's last whole block; a write may go past it */
};

static struct blocks blocks_of(const struct dmb_job *job)
{
	struct blocks blocks = {dmb_max(job->offset_align, job->memory_align) - 1, UINT64_MAX};

	if ((job->base | job->slab_size) & blocks.mask)
		blocks.mask = UINT64_MAX; /* no segment does */
	if (job->direction == DMB_READ)
		blocks.file_end = dmb_align_down(job->file_size, job->offset_align);
	return blocks;
}

/*
 * Whether a segment consists of whole blocks in the file and in memory. The device can move all of
 * it by each route, so no route needs to be measured. Most segments are of this kind.
 */
static bool is_whole(const struct blocks *blocks, const uint64_t *segment)
{
	return !((segment[0] | segment[1] | segment[2]) & blocks->mask) &&
	       segment[0] + segment[2] <= blocks->file_end;
}

static int size_of(const struct dmb_job *job, uint64_t *ret)
{
	struct stat stat;

	if (job->nsid) {
		*ret = job->file_size;
		return 0;
	}
	if (fstat(job->plain_fd, &stat))
		return -errno;
	*ret = (uint64_t)stat.st_size;
	if (S_ISBLK(stat.st_mode) && ioctl(job->plain_fd, BLKGETSIZE64, ret))
		return -errno;
	return 0;
}

int dmb_job_measure(const struct dmb_job *job, const uint64_t *segments, size_t count,
		    struct dmb_measure *ret)
{
	const uint64_t *before = NULL;
	struct dmb_job as = *job;
	struct blocks blocks;
	int rc;

	*ret = (struct dmb_measure){0};
	rc = check_ranges(job, segments, count, ret);
	if (!rc)
		rc = size_of(job, &ret->file_size);
	if (rc)
		return rc;
	as.file_size = ret->file_size;
	as.slot_size = job->slab_size;
	blocks = blocks_of(&as);
	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;
		bool straight;

		if (!segment[2])
			continue;
		add_bounds(segment, ret);
		ret->shared_pages |= shared_pages(job, segment);
		ret->joined += !before || !continues(segment, before);
		before = segment;
		if (is_whole(&blocks, segment)) {
			ret->staged.with_edges++; /* the CPU copies all that is staged */
			continue;
		}
		fit(&as, DMB_NATIVE, segment, &ret->native);
		fit(&as, DMB_STAGED, segment, &ret->staged);
		fit(&as, DMB_DIRECT, segment, &ret->direct);
		straight = !without_straight(&as, segment);
		as.memory_align = (uint32_t)dmb_max(job->memory_align, job->offset_align);
		ret->off_block += straight && without_straight(&as, segment);
		as.memory_align = job->memory_align;
	}
	ret->in_use = job->slabs && ret->nbytes &&
		      !dmb_fences_signalled(job, ret->buffer_start, ret->buffer_end);
	return 0;
}
