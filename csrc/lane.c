/* SPDX-License-Identifier: MIT */
/* Lone small requests between a file and a buffer that are known. */
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

/* The block that holds a file's end is not read straight into a buffer, nor is a file made longer.
 */
static bool before_end(const struct dmb_lane *lane, uint64_t end)
{
	uint64_t size = lane->file_size;
	struct stat stat;

	if (!size) {
		if (fstat(lane->fd, &stat) || stat.st_size < 0)
			return false;
		size = (uint64_t)stat.st_size;
	}
	return end <= dmb_align_down(size, lane->unit);
}

/* Whether no device uses the dma-bufs in the way of the request; more than one is not looked at. */
static bool fences_signalled(const struct dmb_lane *lane, uint64_t start, uint64_t size)
{
	uint64_t slab = start / lane->slab_size;
	struct pollfd one = {
		.fd = lane->slabs[slab],
		.events = lane->direction == DMB_READ ? POLLOUT : POLLIN,
	};

	return (start + size - 1) / lane->slab_size == slab && poll(&one, 1, 0) == 1 &&
	       one.revents == one.events;
}

bool dmb_lane_takes(const struct dmb_lane *lane, uint64_t offset, uint64_t start, uint64_t size,
		    bool fence)
{
	if (!size || size > lane->most || start > lane->size || size > lane->size - start)
		return false;
	if ((offset | size) & (lane->unit - 1) || (lane->base + start) & (lane->memory_align - 1))
		return false;
	if (offset > INT64_MAX - size || !before_end(lane, offset + size))
		return false;
	return !fence || !lane->slabs || fences_signalled(lane, start, size);
}

int dmb_lane_move(const struct dmb_lane *lane, uint64_t offset, uint64_t start, uint64_t size,
		  int fence)
{
	uint64_t address = lane->base + start;

	if (!dmb_lane_takes(lane, offset, start, size, fence))
		return 0;
	return dmb_lone(lane->direction, lane->fd, address, size, offset) == (int64_t)size;
}
