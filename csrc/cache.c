/* SPDX-License-Identifier: MIT */
/*
 * The page cache after a write: drop old bytes of the range that O_DIRECT wrote, and write out the
 * edges, which were written through the cache.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "batch.h"

enum {
	PAUSES = 64, /* maximum pauses of DMB_PAUSE_NS for pages that cannot be dropped yet */
};

/*
 * Drop a range from the page cache and return whether no page of it is left. The kernel keeps pages
 * that are dirty or under I/O, and pages of a folio that extends beyond the range; so the second
 * attempt drops a wider range. Without cachestat(2) (before Linux 6.5) the result cannot be
 * checked, and is true.
 */
static bool drop(int fd, uint64_t start, uint64_t end)
{
	const uint64_t huge = dmb_huge_page();
	uint64_t pages = 0;
	int rc;

	for (int tries = 0;; tries++) {
		rc = dmb_cachestat(fd, start, end - start, &pages);
		if ((!rc && !pages) || tries == 2)
			return !rc && !pages;
		if (rc || tries)
			posix_fadvise(
				fd, (off_t)dmb_align_down(start, huge),
				(off_t)(dmb_align_up(end, huge) - dmb_align_down(start, huge)),
				POSIX_FADV_DONTNEED);
		else
			posix_fadvise(fd, (off_t)start, (off_t)(end - start), POSIX_FADV_DONTNEED);
		if (rc)
			return true;
	}
}

/*
 * Drop the pages of [*at, end) from the page cache; both are multiples of a page. Returns false if
 * a page remains, with its offset in *at.
 */
static bool drop_range(int fd, uint64_t *at, uint64_t end)
{
	const uint64_t page = dmb_page();
	uint64_t size = end - *at;

	while (*at < end) {
		size = dmb_min(size, end - *at);
		if (drop(fd, *at, *at + size)) {
			*at += size;
			size *= 2;
		} else if (size > page) { /* readers may bring pages back: try a smaller part */
			size = dmb_align_up(size / 2, page);
		} else {
			return false;
		}
	}
	return true;
}

/*
 * Write the bytes [skip, skip + size) of the present segment again: before a synchronous write
 * drops pages, it waits for locked ones and unmaps mapped ones.
 */
static int write_again(struct dmb_batch *batch, uint64_t skip, uint64_t size)
{
	const uint64_t *segment = batch->segments + 3 * batch->segment;
	struct dmb_io *io = batch->free;
	int64_t rc;

	if (batch->job.route == DMB_NATIVE)
		return -EBUSY; /* the CPU may not be able to read its bytes */
	rc = dmb_take_block(batch, io);
	if (rc)
		return (int)rc;
	memcpy(io->block, dmb_address(&batch->job, segment, skip), size);
	rc = dmb_read_write(DMB_WRITE, batch->job.fd, (uintptr_t)io->block, size,
			    segment[0] + skip);
	dmb_stage_give(&batch->stage, io->block);
	io->block = NULL;
	batch->result.copied += size;
	if (rc < 0)
		return (int)rc;
	return (uint64_t)rc == size ? 0 : -EIO;
}

/* Write again the part of the middle [start, end) at file offset `at`; return where it ends. */
static uint64_t write_again_at(struct dmb_batch *batch, uint64_t at, uint64_t start, uint64_t end)
{
	const uint64_t *segment = batch->segments + 3 * batch->segment;
	uint64_t from = dmb_align_down(at, batch->job.offset_align);
	uint64_t skip = from > segment[0] + start ? from - segment[0] : start;
	uint64_t size = dmb_min(end - skip, batch->job.block);
	int rc = write_again(batch, skip, size);

	if (rc) {
		const struct dmb_io io = {
			.segment = batch->segment,
			.position = batch->before + skip,
			.skip = skip,
		};

		dmb_fail(batch, &io, -rc);
	}
	return segment[0] + skip + size;
}

static bool pause_drop(struct dmb_batch *batch)
{
	struct dmb_io *io;

	if (batch->pauses++ >= PAUSES)
		return false;
	io = dmb_take_io(batch, batch->segment, batch->skip, batch->before + batch->skip, 0);
	io->kind = DMB_PAUSE;
	io->staged = io->native = false;
	io->file_slot = io->buffer_slot = -1;
	if (!batch->ring->ops->issue(batch->ring, io))
		return true;
	dmb_give_io(batch, io);
	return false;
}

/*
 * The kernel drops a range before an O_DIRECT write, and again after a synchronous one. Pages that
 * another program reads during an asynchronous write keep the old bytes, and an edge that is
 * written through such a page would write them back to the medium.
 */
bool dmb_drop_written(struct dmb_batch *batch)
{
	const struct dmb_job *job = &batch->job;
	const uint64_t page = dmb_page();

	if (!job->stale_cache || job->direction != DMB_WRITE || job->route == DMB_BUFFERED)
		return true;
	if (batch->ring->threads)
		return true; /* threads write synchronously */
	for (; batch->segment < batch->count; batch->segment++, batch->skip = 0) {
		const uint64_t *segment = batch->segments + 3 * batch->segment;
		uint64_t start, end, at, limit;

		dmb_middle(job, segment, &start, &end);
		at = dmb_align_down(segment[0] + dmb_max(start, batch->skip), page);
		limit = dmb_align_up(segment[0] + end, page);
		while (end > start && !drop_range(job->fd, &at, limit)) {
			batch->skip = at > segment[0] ? at - segment[0] : 0;
			if (pause_drop(batch))
				return false;
			at = dmb_align_up(write_again_at(batch, at, start, end), page);
		}
		batch->before += segment[2];
	}
	return true;
}

/* Record that all bytes from a position on may be lost. */
static void fail_from(struct dmb_batch *batch, uint64_t position, int error)
{
	struct dmb_io io = {.position = position, .skip = position};

	while (io.skip >= batch->segments[3 * io.segment + 2])
		io.skip -= batch->segments[3 * io.segment++ + 2];
	dmb_fail(batch, &io, error);
}

/*
 * The flush is a request because it waits for the medium. Its length has 32 bits: 0 means to the
 * end of the file.
 */
bool dmb_begin_flush(struct dmb_batch *batch)
{
	uint64_t start = dmb_align_down(batch->edge_start, batch->job.page);
	uint64_t size = dmb_align_up(batch->edge_end, batch->job.page) - start;
	struct dmb_io *io;
	int rc;

	if (batch->edge_start == UINT64_MAX)
		return false;
	io = dmb_take_io(batch, 0, 0, 0, 0);
	io->kind = DMB_FLUSH;
	io->native = io->staged = io->straight = false;
	io->fd = batch->job.plain_fd;
	io->file_slot = io->buffer_slot = -1;
	io->nsid = 0;
	io->offset = start;
	io->length = size > UINT32_MAX ? 0 : (uint32_t)size;
	rc = batch->ring->ops->issue(batch->ring, io);
	if (rc)
		dmb_end_flush(io, rc);
	return !rc;
}

void dmb_end_flush(struct dmb_io *io, int result)
{
	struct dmb_batch *batch = io->batch;

	if (result < 0)
		fail_from(batch, batch->flush_from, -result);
	posix_fadvise(io->fd, (off_t)io->offset, io->length, POSIX_FADV_DONTNEED);
	dmb_give_io(batch, io);
}
