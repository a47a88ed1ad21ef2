/* SPDX-License-Identifier: MIT */
/*
 * Cutting segments into requests that O_DIRECT accepts.
 *
 * A read requests whole blocks. The device moves the part that is aligned in the file and in memory
 * straight into the buffer, up to the last whole block before the end of the file: past it ext4
 * zeroes the rest of a request's memory. The other blocks are read into a staging block.
 *
 * A write must not write a block that is partly outside the segment. If the segment begins and ends
 * at blocks, all of it is the middle. Otherwise the middle begins and ends at a multiple of the
 * page and of the block, and the edges are written through the page cache in a second pass, when no
 * O_DIRECT write of the same page can be in flight.
 */
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
		return; /* whole blocks */
	if (dmb_align_up(first, align) >= dmb_align_down(last, align)) {
		*start = segment[2]; /* no middle: all of it is the leading edge */
		return;
	}
	*start = dmb_align_up(first, align) - first;
	*end = dmb_align_down(last, align) - first;
}

/* Choose the registered slot, each of slot_size bytes, and end the request within it. */
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
	} else { /* a block that spans two slots is moved unregistered */
		io->want = dmb_min(io->want, align);
		io->buffer_slot = -1;
		io->staged = io->native;
		io->native = false;
	}
}

static void cut_into_buffer(const struct dmb_job *job, const uint64_t *segment, struct dmb_io *io,
			    uint64_t want, uint64_t align, bool edge)
{
	io->want = dmb_min(want, job->block);
	io->address = dmb_address(job, segment, io->skip);
	if (job->slots && !edge)
		choose_slot(job, segment[1] + io->skip, io, align);
	io->length = (uint32_t)io->want;
	io->offset = segment[0] + io->skip;
}

static void cut_staged(const struct dmb_job *job, const uint64_t *segment, struct dmb_io *io,
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

/* Return the address whose alignment matters: on DMB_NATIVE an offset into a dma-buf. */
static uint64_t device_address(const struct dmb_job *job, const uint64_t *segment, uint64_t skip)
{
	if (job->route == DMB_NATIVE)
		return (segment[1] + skip) % job->slot_size;
	return (uintptr_t)dmb_address(job, segment, skip);
}

uint64_t dmb_straight_bytes(const struct dmb_job *job, const uint64_t *segment,
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
	if (device_address(job, segment, io->skip + (start - offset)) % job->memory_align)
		return 0;
	*staged = start - offset;
	return end - start;
}

/* End an NVMe read at the device's end: an NVMe command past it fails as a whole. */
static void end_at_device(const struct dmb_job *job, struct dmb_io *io)
{
	uint64_t room = job->file_size > io->offset ? job->file_size - io->offset : 0;

	if (job->nsid && job->direction == DMB_READ)
		io->length = (uint32_t)dmb_min(io->length, room);
}

/* Return the first extent that ends after a file offset, or NULL. */
static const struct dmb_extent *find_extent(const struct dmb_job *job, uint64_t offset)
{
	size_t low = 0, high = job->extent_count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;
		const struct dmb_extent *extent = job->extents + middle;

		if (extent->offset + extent->size <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low < job->extent_count ? job->extents + low : NULL;
}

/*
 * End a read from the block device of a file within the extent or hole that it begins in, and
 * before the end of the file. Returns the extent; NULL in a hole or at the end of the file, where
 * the request moves nothing.
 */
static const struct dmb_extent *end_in_extent(const struct dmb_job *job, uint64_t offset,
					      struct dmb_io *io)
{
	const struct dmb_extent *extent = find_extent(job, offset);
	uint64_t end = job->file_size;

	if (offset >= end) {
		io->want = io->left;
		io->length = 0;
		return NULL;
	}
	if (extent && extent->offset > offset) {
		end = dmb_min(end, extent->offset);
		extent = NULL;
	} else if (extent) {
		end = dmb_min(end, extent->offset + extent->size);
	}
	io->left = dmb_min(io->left, end - offset);
	if (!extent) {
		io->hole = true;
		io->want = dmb_min(io->left, job->block);
		io->length = 0;
	}
	return extent;
}

static void cut_whole_blocks(const struct dmb_job *job, const uint64_t *segment, struct dmb_io *io)
{
	uint64_t staged, straight = dmb_straight_bytes(job, segment, io, &staged);

	if (straight && !staged) {
		io->straight = true;
		cut_into_buffer(job, segment, io, straight, job->offset_align, false);
		if (io->staged)
			cut_staged(job, segment, io, io->want);
	} else {
		cut_staged(job, segment, io, staged);
	}
	end_at_device(job, io);
}

void dmb_cut_request(const struct dmb_job *job, const uint64_t *segments, struct dmb_io *io,
		     bool edge)
{
	const uint64_t *segment = segments + 3 * io->segment;
	const struct dmb_extent *extent;
	uint64_t left = io->left;

	io->direction = job->direction;
	io->fd = edge ? job->plain_fd : job->fd;
	io->file_slot = edge ? -1 : job->file_slot;
	io->buffer_slot = -1;
	io->address = NULL;
	io->lead = 0;
	io->nsid = job->nsid;
	io->lba_shift = job->lba_shift;
	io->status = 0;
	io->straight = io->native = io->staged = io->hole = false;
	if (edge || job->route == DMB_BUFFERED) {
		cut_into_buffer(job, segment, io, io->left, 1, edge);
		return;
	}
	if (!job->extents) {
		cut_whole_blocks(job, segment, io);
		return;
	}
	extent = end_in_extent(job, segment[0] + io->skip, io);
	if (extent) {
		cut_whole_blocks(job, segment, io);
		io->offset += extent->place - extent->offset;
	}
	io->left = left;
}
