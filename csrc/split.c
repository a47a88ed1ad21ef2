/* SPDX-License-Identifier: MIT */
/*
 * Where a segment is cut, so that O_DIRECT takes its middle.
 *
 * A read asks the device for whole blocks. What is aligned in the file and in memory goes straight
 * into the buffer, up to the last whole block before the end of the file: past it the filesystem
 * zeroes the rest of a request's memory (ext4). Everything else is read, whole blocks of it, into a
 * staging block.
 *
 * A write may only write whole blocks that it owns. One that begins and ends at blocks goes as a
 * whole. Otherwise its middle begins and ends at a multiple of the page and of the block, and its
 * edges go through the page cache in a second pass, when no O_DIRECT write of the same page can be
 * in flight.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

void dmb_middle(const struct dmb_job *job, const uint64_t *segment, uint64_t *start, uint64_t *end)
{
	uint64_t first = segment[0], last = segment[0] + segment[2];
	uint64_t align = job->page > job->offset_align ? job->page : job->offset_align;

	*start = 0;
	*end = segment[2];
	if (job->direction == DMB_READ || job->route == DMB_BUFFERED)
		return;
	if (!((first | last) & (job->offset_align - 1)))
		return; /* whole blocks, all of them the caller's */
	if (dmb_align_up(first, align) >= dmb_align_down(last, align)) {
		*start = segment[2]; /* no middle: all of it is the leading edge */
		return;
	}
	*start = dmb_align_up(first, align) - first;
	*end = dmb_align_down(last, align) - first;
}

/* A registered buffer's slot covers slot_size bytes, and a request stays within one. */
static void choose_slot(const struct dmb_job *job, uint64_t buffer_offset, struct dmb_io *io,
			uint64_t align)
{
	uint64_t room = job->slot_size - buffer_offset % job->slot_size;

	io->buffer_slot = job->slots[buffer_offset / job->slot_size];
	io->native = job->route == DMB_NATIVE;
	if (io->native)
		io->address = (uint8_t *)(uintptr_t)(buffer_offset % job->slot_size);
	if (io->want <= room)
		return;
	if (room >= align) {
		io->want = dmb_align_down(room, align);
	} else { /* the block that straddles two slots goes unregistered */
		io->want = dmb_min(io->want, align);
		io->buffer_slot = -1;
		io->staged = io->native;
		io->native = false;
	}
}

static void shape_into_buffer(const struct dmb_job *job, const uint64_t *segment, struct dmb_io *io,
			      uint64_t want, uint64_t align, bool edge)
{
	io->want = dmb_min(want, job->block);
	io->address = dmb_address(job, segment, io->skip);
	if (job->slots && !edge)
		choose_slot(job, segment[1] + io->skip, io, align);
	io->length = (uint32_t)io->want;
	io->offset = segment[0] + io->skip;
}

static void shape_staged(const struct dmb_job *job, const uint64_t *segment, struct dmb_io *io,
			 uint64_t limit)
{
	uint64_t offset = segment[0] + io->skip;

	io->staged = true;
	io->address = NULL;
	io->straight = false;
	io->offset = dmb_align_down(offset, job->offset_align);
	io->lead = (uint32_t)(offset - io->offset);
	io->want = dmb_min(limit, job->block - io->lead);
	io->length = (uint32_t)dmb_align_up(io->lead + io->want, job->offset_align);
}

/* What the device sees as the memory's address: on DMB_NATIVE an offset into a dma-buf. */
static uint64_t place(const struct dmb_job *job, const uint64_t *segment, uint64_t skip)
{
	if (job->route == DMB_NATIVE)
		return (segment[1] + skip) % job->slot_size;
	return (uintptr_t)dmb_address(job, segment, skip);
}

/* How many bytes from here may go straight, and how many must be staged before any may. */
static uint64_t straight_bytes(const struct dmb_job *job, const uint64_t *segment,
			       const struct dmb_io *io, uint64_t *staged)
{
	uint64_t offset = segment[0] + io->skip, align = job->offset_align;
	uint64_t start = dmb_align_up(offset, align);
	uint64_t end = offset + io->left;

	if (job->direction == DMB_READ)
		end = dmb_min(dmb_align_down(end, align), dmb_align_down(job->file_size, align));
	*staged = io->left;
	if ((job->route != DMB_DIRECT && job->route != DMB_NATIVE) || end <= start)
		return 0;
	if (place(job, segment, io->skip + (start - offset)) % job->memory_align)
		return 0;
	*staged = start - offset;
	return end - start;
}

/* A block device moves what there is before its end; to an NVMe command that is an error. */
static void end_at_device(const struct dmb_job *job, struct dmb_io *io)
{
	uint64_t room = job->file_size > io->offset ? job->file_size - io->offset : 0;

	if (job->nsid && job->direction == DMB_READ)
		io->length = (uint32_t)dmb_min(io->length, room);
}

void dmb_shape(const struct dmb_job *job, const uint64_t *segments, struct dmb_io *io, bool edge)
{
	const uint64_t *segment = segments + 3 * io->segment;
	uint64_t staged, straight;

	io->direction = job->direction;
	io->fd = edge ? job->edge_fd : job->fd;
	io->file_slot = edge ? -1 : job->file_slot;
	io->buffer_slot = -1;
	io->address = NULL;
	io->lead = 0;
	io->nsid = job->nsid;
	io->lba_shift = job->lba_shift;
	io->status = 0;
	io->straight = io->native = io->staged = false;
	if (edge || job->route == DMB_BUFFERED) {
		shape_into_buffer(job, segment, io, io->left, 1, edge);
		return;
	}
	straight = straight_bytes(job, segment, io, &staged);
	if (straight && !staged) {
		io->straight = true;
		shape_into_buffer(job, segment, io, straight, job->offset_align, false);
		if (io->staged)
			shape_staged(job, segment, io, io->want);
	} else {
		shape_staged(job, segment, io, staged);
	}
	end_at_device(job, io);
}

size_t dmb_segments_without_middle(const struct dmb_job *job, const uint64_t *segments,
				   size_t count)
{
	size_t without = 0;

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;
		struct dmb_io io = {0};
		uint64_t end, staged, moved;

		dmb_middle(job, segment, &io.skip, &end);
		io.left = moved = end > io.skip ? end - io.skip : 0;
		if (job->route == DMB_DIRECT || job->route == DMB_NATIVE)
			moved = straight_bytes(job, segment, &io, &staged);
		if (segment[2] && !moved)
			without++;
	}
	return without;
}

static bool all_straight(const struct dmb_job *job, const uint64_t *segment)
{
	struct dmb_io io = {.left = segment[2]};
	uint64_t start, end, staged, room;

	dmb_middle(job, segment, &start, &end);
	if (start || end != segment[2] || straight_bytes(job, segment, &io, &staged) != end)
		return false;
	if (job->route != DMB_NATIVE)
		return true;
	room = job->slot_size - segment[1] % job->slot_size;
	return end <= room || !(room % job->offset_align);
}

size_t dmb_segments_with_edges(const struct dmb_job *job, const uint64_t *segments, size_t count)
{
	size_t with = 0;

	for (size_t i = 0; i < count; i++)
		with += segments[3 * i + 2] && !all_straight(job, segments + 3 * i);
	return with;
}

size_t dmb_segments_join(const uint64_t *segments, size_t count, uint64_t *ret)
{
	uint64_t joined[3] = {0};
	size_t used = 0;

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;

		if (!segment[2])
			continue;
		if (used && segment[0] == joined[0] + joined[2] &&
		    segment[1] == joined[1] + joined[2]) {
			joined[2] += segment[2];
		} else {
			memcpy(joined, segment, sizeof(joined));
			used++;
		}
		if (ret)
			memcpy(ret + 3 * (used - 1), joined, sizeof(joined));
	}
	return used;
}

void dmb_segments_bounds(const uint64_t *segments, size_t count, struct dmb_bounds *ret)
{
	struct dmb_bounds bounds = {.file_start = UINT64_MAX, .buffer_start = UINT64_MAX};

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;

		if (!segment[2])
			continue;
		bounds.nbytes += segment[2];
		bounds.file_start = dmb_min(bounds.file_start, segment[0]);
		bounds.file_end = dmb_max(bounds.file_end, segment[0] + segment[2]);
		bounds.buffer_start = dmb_min(bounds.buffer_start, segment[1]);
		bounds.buffer_end = dmb_max(bounds.buffer_end, segment[1] + segment[2]);
	}
	*ret = bounds.nbytes ? bounds : (struct dmb_bounds){0};
}

static int by_file_offset(const void *a, const void *b)
{
	const uint64_t *left = *(const uint64_t *const *)a, *right = *(const uint64_t *const *)b;

	return left[0] < right[0] ? -1 : left[0] > right[0];
}

static int find_overlap(const uint64_t **order, size_t count, const uint64_t *segments, size_t *ret)
{
	for (size_t i = 1; i < count; i++) {
		const uint64_t *later;

		if (order[i - 1][0] + order[i - 1][2] <= order[i][0])
			continue;
		later = order[i - 1] > order[i] ? order[i - 1] : order[i];
		*ret = (size_t)(later - segments) / 3;
		return -EEXIST;
	}
	return 0;
}

static int check_overlap(const uint64_t *segments, size_t count, size_t *ret)
{
	const uint64_t **order;
	size_t used = 0;
	int rc;

	order = malloc((count ? count : 1) * sizeof(*order));
	if (!order)
		return -ENOMEM;
	for (size_t i = 0; i < count; i++)
		if (segments[3 * i + 2])
			order[used++] = segments + 3 * i;
	qsort(order, used, sizeof(*order), by_file_offset);
	rc = find_overlap(order, used, segments, ret);
	free(order);
	return rc;
}

int dmb_segments_check(const uint64_t *segments, size_t count, uint64_t size, int direction,
		       size_t *ret)
{
	bool ascending = true;
	uint64_t end = 0;

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;

		*ret = i;
		if (segment[2] > size || segment[1] > size - segment[2])
			return -ERANGE;
		if (segment[0] > INT64_MAX || segment[2] > INT64_MAX - segment[0])
			return -ERANGE;
		if (segment[2] && segment[0] < end)
			ascending = false;
		if (segment[2])
			end = segment[0] + segment[2];
	}
	*ret = 0;
	if (direction == DMB_READ || ascending)
		return 0;
	return check_overlap(segments, count, ret);
}
