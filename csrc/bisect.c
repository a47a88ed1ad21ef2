/* SPDX-License-Identifier: MIT */
/*
 * The search for a medium's bad block. The block layer merges adjacent requests, and a bad block
 * fails all of them. So the requests from the failed one on are repeated one at a time, and the one
 * that fails alone is halved until the block is found.
 */
#include <errno.h>

#include "batch.h"

/* Return whether a request failed because of the medium. */
static bool bad_medium(const struct dmb_batch *batch)
{
	if (batch->stopping || batch->stop < batch->failed.position)
		return false;
	return batch->error == EIO || batch->error == ENODATA || batch->error == EILSEQ ||
	       batch->error == EREMOTEIO;
}

static bool one_block_is_bad(const struct dmb_batch *batch)
{
	uint64_t unit = batch->job.offset_align;
	uint64_t offset = batch->segments[3 * batch->failed.segment] + batch->bad_skip;
	uint64_t size = batch->bad_end - batch->bad_position;

	return !size || dmb_align_down(offset, unit) == dmb_align_down(offset + size - 1, unit);
}

void dmb_bisect_half(struct dmb_batch *batch)
{
	uint64_t unit = batch->job.offset_align;
	uint64_t offset = batch->segments[3 * batch->failed.segment] + batch->bad_skip;
	uint64_t middle = dmb_align_down(offset + (batch->bad_end - batch->bad_position) / 2, unit);

	if (middle <= offset)
		middle = dmb_align_down(offset, unit) + unit;
	batch->error = 0;
	batch->stop = UINT64_MAX;
	batch->tried_end = batch->bad_position + (middle - offset);
	dmb_start_io(batch, dmb_take_io(batch, batch->failed.segment, batch->bad_skip,
					batch->bad_position, middle - offset));
}

bool dmb_retry_alone(struct dmb_batch *batch)
{
	const struct dmb_io *failed = &batch->failed;
	uint64_t issued = batch->before + batch->skip;

	if (!bad_medium(batch) || batch->job.depth == 1)
		return false;
	if (failed->position < batch->alone_until || failed->position >= issued)
		return false;
	batch->alone_until = issued;
	batch->segment = failed->segment;
	batch->before = failed->position - failed->skip;
	batch->skip = failed->skip;
	batch->error = 0;
	batch->stop = UINT64_MAX;
	batch->result.short_segment = -1;
	return true;
}

bool dmb_begin_bisect(struct dmb_batch *batch)
{
	const struct dmb_io *failed = &batch->failed;

	if (!bad_medium(batch))
		return false;
	batch->bad_error = batch->error;
	batch->bad_skip = failed->skip;
	batch->bad_position = failed->position;
	batch->bad_end = failed->position + failed->left;
	batch->tried_end = failed->position;
	return !one_block_is_bad(batch);
}

bool dmb_bisect_narrow(struct dmb_batch *batch)
{
	uint64_t reached = dmb_min(batch->tried_end, batch->stop);
	bool unclear = batch->stop != UINT64_MAX && !batch->error; /* end of file or interruption */

	batch->bad_skip += reached - batch->bad_position;
	batch->bad_position = reached;
	if (batch->error) {
		batch->bad_error = batch->error;
		batch->bad_end = batch->tried_end;
	}
	if (!unclear && !batch->stopping && !one_block_is_bad(batch))
		return false;
	if (batch->result.short_segment >= 0)
		return true; /* another program truncated the file */
	batch->error = batch->bad_error;
	batch->failed.skip = batch->bad_skip;
	batch->failed.position = batch->stop = batch->bad_position;
	return true;
}
