/* SPDX-License-Identifier: MIT */
/* How a segment is cut, over random alignments, offsets, sizes, ends of file and slots. */
#include "test.h"

enum { ROUNDS = 10000, SLOTS = 16 };

static struct dmb_job random_job(const int32_t *slots)
{
	struct dmb_job job = {
		.fd = 3,
		.file_slot = 5,
		.plain_fd = 4,
		.memory_align = 1U << random_below(13),
		.offset_align = 1U << random_below(15),
		.page = PAGE,
		.file_size = random_near(1 << 20, 512),
		.base = dmb_align_up(0x7f0000000000, PAGE) + (random_below(4) ? 0 : 4),
		.size = 1 << 20,
		.direction = (int32_t)random_below(2),
		.route = DMB_DIRECT + (int32_t)random_below(3),
		.depth = 1,
	};
	uint32_t align = job.memory_align > job.offset_align ? job.memory_align : job.offset_align;

	job.block = align * (1 + (uint32_t)random_below(8));
	if (random_below(2)) {
		job.slots = slots;
		job.slot_size = dmb_align_up(1 + random_below(job.size), PAGE);
		while (job.size / job.slot_size >= SLOTS)
			job.slot_size *= 2;
	}
	return job;
}

static void check_slot(const struct dmb_job *job, const struct dmb_io *io, uint64_t offset)
{
	if (io->buffer_slot < 0)
		return;
	CHECK(job->slots);
	CHECK_EQUAL(io->buffer_slot, job->slots[offset / job->slot_size]);
	CHECK_EQUAL(offset / job->slot_size, (offset + io->length - 1) / job->slot_size);
}

static void check_into_buffer(const struct dmb_job *job, const uint64_t *segment,
			      const struct dmb_io *io)
{
	CHECK(io->address == dmb_address(job, segment, io->skip));
	CHECK_EQUAL(io->length, io->want);
	CHECK_EQUAL(io->offset, segment[0] + io->skip);
	CHECK_EQUAL(io->lead, 0);
	CHECK(io->length <= job->block);
	check_slot(job, io, segment[1] + io->skip);
}

static void check_straight(const struct dmb_job *job, const struct dmb_io *io)
{
	uint64_t align = job->offset_align;

	CHECK_EQUAL(job->route, DMB_DIRECT);
	CHECK_EQUAL(io->offset % align, 0);
	CHECK_EQUAL(io->length % align, 0);
	CHECK_EQUAL((uintptr_t)io->address % job->memory_align, 0);
	if (job->direction == DMB_READ)
		CHECK(io->offset + io->length <= dmb_align_down(job->file_size, align));
}

static void check_staged(const struct dmb_job *job, const uint64_t *segment,
			 const struct dmb_io *io)
{
	uint64_t align = job->offset_align;

	CHECK(!io->address);
	CHECK_EQUAL(io->offset % align, 0);
	CHECK_EQUAL(io->length % align, 0);
	CHECK_EQUAL(io->offset + io->lead, segment[0] + io->skip);
	CHECK(io->lead < align);
	CHECK(io->lead + io->want <= io->length);
	CHECK(io->length <= job->block);
	CHECK_EQUAL(io->buffer_slot, -1);
	if (job->direction == DMB_WRITE) { /* whole blocks within the segments */
		CHECK_EQUAL(io->lead, 0);
		CHECK_EQUAL(io->length, io->want);
	}
}

/* Cut [start, end) of a segment as a batch does, and check that the pieces cover it. */
static void check_part(const struct dmb_job *job, const uint64_t *segment, uint64_t start,
		       uint64_t end, bool edge, uint64_t *straight)
{
	struct dmb_io io = {0};

	for (io.skip = start; io.skip < end; io.skip += io.want) {
		io.left = end - io.skip;
		dmb_cut_request(job, segment, &io, edge);
		CHECK(io.want > 0);
		CHECK(io.want <= io.left);
		CHECK_EQUAL(io.fd, edge ? 4 : 3);
		CHECK_EQUAL(io.file_slot, edge ? -1 : 5);
		if (io.straight)
			check_straight(job, &io);
		if (edge)
			CHECK_EQUAL(io.buffer_slot, -1);
		if (edge || job->route == DMB_BUFFERED || io.straight)
			check_into_buffer(job, segment, &io);
		else
			check_staged(job, segment, &io);
		*straight += io.straight ? io.want : 0;
	}
	CHECK_EQUAL(io.skip, start < end ? end : start);
}

/* What must have gone straight: nothing less than every block that may. */
static uint64_t may_go_straight(const struct dmb_job *job, const uint64_t *segment, uint64_t start,
				uint64_t end)
{
	uint64_t align = job->offset_align, first = dmb_align_up(segment[0] + start, align);
	uint64_t last = segment[0] + end;

	if (job->direction == DMB_READ)
		last = dmb_min(last, job->file_size);
	last = dmb_align_down(last, align);
	if (job->route != DMB_DIRECT || last <= first || job->memory_align > align)
		return 0;
	if ((job->base + segment[1] + (first - segment[0])) % job->memory_align)
		return 0;
	return last - first;
}

static void check_middle(const struct dmb_job *job, const uint64_t *segment, uint64_t start,
			 uint64_t end)
{
	uint64_t align = job->page > job->offset_align ? job->page : job->offset_align;

	CHECK(start <= end);
	CHECK(end <= segment[2]);
	if (job->direction == DMB_READ || job->route == DMB_BUFFERED ||
	    !((segment[0] | segment[2]) % job->offset_align)) {
		CHECK_EQUAL(end - start, segment[2]);
		return;
	}
	if (start == end) { /* no page is whole */
		CHECK(dmb_align_up(segment[0], align) + align > segment[0] + segment[2]);
		return;
	}
	CHECK_EQUAL((segment[0] + start) % align, 0);
	CHECK_EQUAL((segment[0] + end) % align, 0);
	CHECK(start < align);
	CHECK(segment[2] - end < align);
}

/* More than 32 bits hold, with requests of 1 GiB and more. */
static void make_huge(struct dmb_job *job, uint64_t *segment)
{
	job->slots = NULL;
	job->size = 1ULL << 42;
	job->file_size <<= 20;
	job->block = random_below(2) ? 1U << 30 : 0xffffc000;
	segment[0] <<= random_below(10);
	segment[1] <<= random_below(10);
	segment[2] = random_near(1ULL << 36, 512);
}

int main(void)
{
	int32_t slots[SLOTS];

	for (int i = 0; i < SLOTS; i++)
		slots[i] = i % 5 == 4 ? -1 : 100 + i;
	for (unsigned round = 0; round < ROUNDS; round++) {
		struct dmb_job job = random_job(slots);
		uint64_t segment[3] = {random_near(1 << 20, 512), random_near(1 << 20, 512)};
		uint64_t start, end, straight = 0, none = 0;

		context("split", round);
		segment[2] = random_near((1 << 20) - segment[1], 512) >> random_below(8);
		if (round % 100 == 0)
			segment[0] += (uint64_t)INT64_MAX - (4 << 20);
		if (round % 100 == 1)
			make_huge(&job, segment);
		dmb_middle(&job, segment, &start, &end);
		check_middle(&job, segment, start, end);
		check_part(&job, segment, 0, start, true, &none);
		check_part(&job, segment, start, end, false, &straight);
		check_part(&job, segment, end, segment[2], true, &none);
		CHECK_EQUAL(none, 0);
		if (job.memory_align <= job.offset_align)
			CHECK_EQUAL(straight, may_go_straight(&job, segment, start, end));
	}
	return finish();
}
