/* SPDX-License-Identifier: MIT */
/* Issuing requests again after EAGAIN or EINTR, and submission by kernel threads. */
#include <errno.h>
#include <time.h>

#include "batch.h"

enum {
	REISSUES_AT_ONCE = 16,
	REISSUES_MAX = 256, /* with a pause before each of the last 240: 24 ms in all */
	REISSUE_PAUSE_NS = 100000,
	ASYNC_BYTES = 65536, /* a copy that takes too long during submission */
};

int64_t dmb_now_ms(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

void dmb_sleep_ns(long ns)
{
	const struct timespec time = {.tv_nsec = ns};

	nanosleep(&time, NULL);
}

/* An event loop must not block while the kernel copies to or from the page cache. */
bool dmb_needs_async(const struct dmb_batch *batch, uint32_t length)
{
	return length >= ASYNC_BYTES && batch->job.route == DMB_BUFFERED &&
	       batch->ring->eventfd >= 0;
}

bool dmb_is_abandoned(const struct dmb_batch *batch, const struct dmb_io *io)
{
	return batch->stopping || io->position >= batch->stop;
}

bool dmb_is_transient(int result)
{
	return result == -EAGAIN || result == -EINTR;
}

/*
 * While no path to an NVMe namespace is usable, the kernel refuses passthrough: io_uring with
 * EINVAL, ioctl(2) with EAGAIN (nvme_ns_head_chr_uring_cmd and nvme_ns_head_chr_ioctl in
 * drivers/nvme/host/ioctl.c).
 */
static bool may_lack_a_path(const struct dmb_io *io, int result)
{
	return io->nsid && result == -EINVAL && !io->status;
}

bool dmb_may_reissue(const struct dmb_io *io, int result)
{
	return (dmb_is_transient(result) || may_lack_a_path(io, result)) &&
	       !dmb_is_abandoned(io->batch, io) && io->reissues < REISSUES_MAX;
}

void dmb_reissue(struct dmb_ring *ring, struct dmb_io *list)
{
	bool often = false;

	for (struct dmb_io *io = list; io; io = io->next)
		often = io->reissues++ >= REISSUES_AT_ONCE || often;
	if (often)
		dmb_sleep_ns(REISSUE_PAUSE_NS);
	while (list) {
		struct dmb_io *io = list;
		int rc;

		list = io->next;
		io->batch->result.reissues++;
		rc = ring->ops->issue(ring, io);
		if (rc)
			dmb_finish_io(io, rc);
	}
}
