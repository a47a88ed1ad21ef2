/* SPDX-License-Identifier: MIT */
/* What a batch makes of completions that went wrong, put there by the rings' filter. */
#include "test.h"

#include <fcntl.h>
#include <unistd.h>

enum { FILE_SIZE = 80000, MEMORY = 20 * PAGE, SEGMENTS = 5, ROUNDS = 8, BAD = 3 };

static struct file file;
static struct memory memory;

/* The faults of one transfer. */
struct faults {
	unsigned storm;	      /* EAGAIN and EINTR this often for each completion */
	bool shorten;	      /* sometimes a part only */
	int error;	      /* of requests that touch a bad block */
	uint64_t bad[BAD];    /* file offsets of bad blocks */
	uint64_t granularity; /* their size */
	unsigned calls;
	unsigned injected;
	unsigned edges; /* calls for bytes that went neither straight nor in whole blocks */
};

static bool is_bad(const struct faults *faults, uint64_t start, uint64_t end)
{
	for (int i = 0; i < BAD; i++)
		if (start < faults->bad[i] + faults->granularity && faults->bad[i] < end)
			return true;
	return false;
}

static int32_t inject(void *arg, const struct dmb_completion *completion)
{
	struct faults *faults = arg;
	int32_t result = completion->result;

	if (result < 0) /* a real one: no test here asks for it */
		return result;
	if (faults->calls++ % (faults->storm + 1) < faults->storm) {
		faults->injected++;
		return faults->calls & 1 ? -EAGAIN : -EINTR;
	}
	if (faults->error &&
	    is_bad(faults, completion->offset, completion->offset + completion->size))
		return -faults->error;
	if (faults->shorten && random_below(2) && result > (int32_t)faults->granularity)
		return (int32_t)(faults->granularity +
				 random_below((uint64_t)result - faults->granularity));
	return result;
}

static uint64_t granularity_of(const struct dmb_job *job)
{
	return job->route == DMB_BUFFERED ? 512 : job->offset_align;
}

static struct faults no_faults(const struct dmb_job *job)
{
	return (struct faults){.granularity = granularity_of(job),
			       .bad = {UINT64_MAX / 2, UINT64_MAX / 2, UINT64_MAX / 2}};
}

static size_t prepare(struct dmb_job *job, uint64_t *segments, int direction, int route)
{
	*job = make_job(&file, &memory, direction, route);
	random_segments(segments, SEGMENTS, file.size, memory.size, direction);
	if (direction == DMB_READ)
		memset(memory.bytes, POISON, memory.size);
	else
		random_bytes(memory.bytes, memory.size);
	return SEGMENTS;
}

static uint64_t sum(const uint64_t *segments)
{
	uint64_t total = 0;

	for (size_t i = 0; i < SEGMENTS; i++)
		total += segments[3 * i + 2];
	return total;
}

static void storms(struct dmb_ring *ring, int direction, int route)
{
	for (unsigned round = 0; round < ROUNDS; round++) {
		uint64_t segments[3 * SEGMENTS];
		struct dmb_job job;
		size_t count = prepare(&job, segments, direction, route);
		struct faults faults = no_faults(&job);
		struct dmb_result result;

		context("storms and short completions", round);
		faults.storm = (unsigned)random_below(3);
		faults.shorten = round & 1;
		if (direction == DMB_WRITE && route != DMB_BUFFERED)
			faults.shorten = false;
		dmb_testing_set_filter(inject, &faults);
		result = transfer(ring, &job, segments, count);
		CHECK_EQUAL(result.error, 0);
		CHECK_EQUAL(result.nbytes, sum(segments));
		CHECK_EQUAL(result.reissues, faults.injected);
		CHECK_EQUAL(result.requests + result.reissues, faults.calls);
		check_moved(&file, &memory, segments, count, direction, result.nbytes, false);
	}
}

/* A short O_DIRECT write goes on at a block of the file, and its memory with it. */
static int32_t whole_blocks_less(void *arg, const struct dmb_completion *completion)
{
	const struct faults *faults = arg;
	int32_t result = completion->result, part;

	if (result <= (int32_t)faults->granularity || completion->size % faults->granularity ||
	    random_below(2))
		return result;
	part = (int32_t)random_below((uint64_t)result);
	return part < (int32_t)faults->granularity ? (int32_t)faults->granularity : part;
}

static void short_writes(struct dmb_ring *ring, int route)
{
	for (unsigned round = 0; round < ROUNDS; round++) {
		uint64_t segments[3 * SEGMENTS];
		struct dmb_job job;
		size_t count = prepare(&job, segments, DMB_WRITE, route);
		struct faults faults = no_faults(&job);
		struct dmb_result result;

		context("short writes", round);
		dmb_testing_set_filter(whole_blocks_less, &faults);
		result = transfer(ring, &job, segments, count);
		CHECK_EQUAL(result.error, 0);
		CHECK_EQUAL(result.nbytes, sum(segments));
		check_moved(&file, &memory, segments, count, DMB_WRITE, result.nbytes, false);
	}
}

/* A storm that does not end is an error at the first byte. */
static void endless_storm(struct dmb_ring *ring)
{
	uint64_t segments[3] = {PAGE, 0, 4 * PAGE};
	struct dmb_job job = make_job(&file, &memory, DMB_READ, DMB_DIRECT);
	struct faults faults = no_faults(&job);
	struct dmb_result result;

	context("endless storm", 0);
	memset(memory.bytes, POISON, memory.size);
	faults.storm = UINT32_MAX - 1;
	dmb_testing_set_filter(inject, &faults);
	result = transfer(ring, &job, segments, 1);
	CHECK(result.error == EAGAIN || result.error == EINTR);
	CHECK_EQUAL(result.nbytes, 0);
	CHECK_EQUAL(result.error_offset, PAGE);
	CHECK(result.reissues >= 256);
}

static int32_t a_page_after_a_storm(void *arg, const struct dmb_completion *completion)
{
	unsigned *calls = arg;

	if (++*calls % 201)
		return -EAGAIN;
	return (int32_t)dmb_min(completion->result, PAGE);
}

/* Each request may be issued again so often, and each part of one: earlier ones do not count. */
static void storms_in_turn(struct dmb_ring *ring)
{
	uint64_t segments[3] = {0, 0, 6 * PAGE};
	struct dmb_job job = make_job(&file, &memory, DMB_READ, DMB_DIRECT);
	struct dmb_result result;
	unsigned calls = 0;

	context("storms in turn", 0);
	memset(memory.bytes, POISON, memory.size);
	job.depth = 1;
	job.block = 2 * PAGE;
	dmb_testing_set_filter(a_page_after_a_storm, &calls);
	result = transfer(ring, &job, segments, 1);
	CHECK_EQUAL(result.error, 0);
	CHECK_EQUAL(result.nbytes, 6 * PAGE);
	CHECK_EQUAL(result.reissues, 6 * 200);
	check_moved(&file, &memory, segments, 1, DMB_READ, result.nbytes, false);
}

/* The position of the first byte that cannot move, where it is in the file, and why. */
static uint64_t first_bad(const struct dmb_job *job, const struct faults *faults,
			  const uint64_t *segments, size_t count, uint64_t *offset, int *error)
{
	uint64_t before = 0, unit = faults->granularity;

	*offset = 0;
	*error = 0;
	for (size_t i = 0; i < count; before += segments[3 * i++ + 2]) {
		const uint64_t *segment = segments + 3 * i;
		uint64_t start, end;

		dmb_middle(job, segment, &start, &end);
		for (uint64_t skip = 0; skip < segment[2]; skip++) {
			uint64_t at = segment[0] + skip, last = at + 1;

			/* an edge is requests of a block at most, each moved or not */
			if (skip < start && skip % job->block == 0)
				last = at + dmb_min(start - skip, job->block);
			else if (skip >= end && (skip - end) % job->block == 0)
				last = at + dmb_min(segment[2] - skip, job->block);
			if (skip >= start && skip < end && job->route != DMB_BUFFERED)
				at = dmb_align_down(at, unit), last = at + unit;
			*offset = segment[0] + skip;
			*error = faults->error;
			if (is_bad(faults, at, last))
				return before + skip;
			*error = 0;
			if (job->direction == DMB_READ && *offset >= file.size)
				return before + skip;
		}
	}
	return before;
}

static void bad_blocks(struct dmb_ring *ring, int direction, int route)
{
	static const int errors[] = {EIO, ENODATA, EILSEQ, EREMOTEIO};

	for (unsigned round = 0; round < 2 * ROUNDS; round++) {
		uint64_t segments[3 * SEGMENTS], nbytes, offset;
		int error;
		struct dmb_job job;
		size_t count = prepare(&job, segments, direction, route);
		struct faults faults = no_faults(&job);
		struct dmb_result result;

		context(direction == DMB_READ ? "bad blocks, read" : "bad blocks, write", round);
		if (direction == DMB_READ && round & 1) /* and the end of the file among them */
			random_segments(segments, count, file.size + PAGE, memory.size, direction);
		faults.error = errors[round % 4];
		faults.storm = round % 5 == 0;
		for (uint64_t i = 0; i <= random_below(BAD); i++)
			faults.bad[i] = dmb_align_down(random_below(file.size), faults.granularity);
		dmb_testing_set_filter(inject, &faults);
		result = transfer(ring, &job, segments, count);
		nbytes = first_bad(&job, &faults, segments, count, &offset, &error);
		CHECK_EQUAL(result.nbytes, nbytes);
		CHECK_EQUAL(result.error, error);
		if (result.error)
			CHECK_EQUAL(result.error_offset, offset);
		CHECK_EQUAL(result.short_segment >= 0, !error && nbytes < sum(segments));
		check_moved(&file, &memory, segments, count, direction, result.nbytes, false);
	}
}

/* Other errors are not looked into: the request's first byte is named. */
static void other_errors(struct dmb_ring *ring, int direction, int route)
{
	static const int errors[] = {ENOMEM, ECANCELED, EFAULT, ENOSPC, EOPNOTSUPP, EINVAL};

	for (unsigned round = 0; round < ROUNDS; round++) {
		uint64_t segments[3 * SEGMENTS], nbytes, offset;
		int error;
		struct dmb_job job;
		size_t count = prepare(&job, segments, direction, route);
		struct faults faults = no_faults(&job);
		struct dmb_result result;

		context("other errors", round);
		faults.error = errors[round % 6];
		faults.bad[0] = dmb_align_down(random_below(file.size), faults.granularity);
		dmb_testing_set_filter(inject, &faults);
		result = transfer(ring, &job, segments, count);
		nbytes = first_bad(&job, &faults, segments, count, &offset, &error);
		CHECK(result.nbytes <= nbytes);
		CHECK(result.nbytes + job.block > nbytes);
		CHECK_EQUAL(result.error, error);
		if (result.error)
			CHECK_EQUAL(result.error_offset, offset_of(segments, count, result.nbytes));
		check_moved(&file, &memory, segments, count, direction, result.nbytes, false);
	}
}

/* Memory that the device cannot reach: a real EFAULT, and which kind of request met it. */
static void unreachable(struct dmb_ring *ring)
{
	uint64_t segments[6] = {0, 0, 4 * PAGE, 4 * PAGE, memory.size, PAGE};
	struct dmb_job job = make_job(&file, &memory, DMB_READ, DMB_DIRECT);
	struct dmb_result result;

	context("unreachable memory", 0);
	dmb_testing_set_filter(NULL, NULL);
	job.size += PAGE; /* one that nobody may touch */
	result = transfer(ring, &job, segments, 2);
	CHECK_EQUAL(result.error, EFAULT);
	CHECK_EQUAL(result.failed_straight, 1);
	CHECK_EQUAL(result.nbytes, 4 * PAGE);
	CHECK_EQUAL(result.error_offset, 4 * PAGE);
}

/* Edges that the page cache took and could not write out: all from the first one on is in doubt. */
static void flush_fails(struct dmb_ring *ring)
{
	static const struct {
		uint64_t segment[3], nbytes;
	} cases[] = {
		{{100, 0, 3 * PAGE}, 0},
		{{0, 0, 2 * PAGE + 10}, 2 * PAGE},
		{{10, 0, 20}, 0},
	};
	int null = open("/dev/null", O_RDWR | O_CLOEXEC); /* takes a write, and no sync */

	dmb_testing_set_filter(NULL, NULL);
	for (unsigned i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct dmb_job job = make_job(&file, &memory, DMB_WRITE, DMB_DIRECT);
		struct dmb_result result;

		context("a flush that fails", i);
		job.plain_fd = null;
		result = transfer(ring, &job, cases[i].segment, 1);
		CHECK_EQUAL(result.error, ESPIPE);
		CHECK_EQUAL(result.nbytes, cases[i].nbytes);
		CHECK_EQUAL(result.error_offset, cases[i].segment[0] + cases[i].nbytes);
		check_moved(&file, &memory, cases[i].segment, 1, DMB_WRITE, 0, false);
	}
	close(null);
}

struct order {
	bool again; /* the next straight request is reported as EAGAIN, and so issued again */
	unsigned straight, edges, late;
};

static int32_t observe(void *arg, const struct dmb_completion *completion)
{
	struct order *order = arg;

	if (completion->result < 0)
		return completion->result;
	if (!completion->straight) {
		order->edges++;
	} else if (order->again) {
		order->again = false;
		return -EAGAIN;
	} else {
		order->straight++;
		order->late += order->edges > 0;
	}
	return completion->result;
}

/* The edges of a write wait until its middle is complete, also where a request is issued again. */
static void edges_come_last(struct dmb_ring *ring)
{
	uint64_t segments[3] = {100, 100, 15 * PAGE};

	for (unsigned round = 0; round < ROUNDS; round++) {
		struct dmb_job job = make_job(&file, &memory, DMB_WRITE, DMB_DIRECT);
		struct order order = {.again = true};
		struct dmb_result result;

		context("edges come last", round);
		random_bytes(memory.bytes, memory.size);
		job.block = PAGE;
		dmb_testing_set_filter(observe, &order);
		result = transfer(ring, &job, segments, 1);
		CHECK_EQUAL(result.error, 0);
		CHECK_EQUAL(order.straight, 14);
		CHECK_EQUAL(order.edges, 2);
		CHECK_EQUAL(order.late, 0);
		check_moved(&file, &memory, segments, 1, DMB_WRITE, result.nbytes, false);
	}
}

static void test(struct dmb_ring *ring)
{
	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	edges_come_last(ring);
	for (int route = DMB_DIRECT; route <= DMB_BUFFERED; route++) {
		for (int direction = DMB_READ; direction <= DMB_WRITE; direction++) {
			storms(ring, direction, route);
			bad_blocks(ring, direction, route);
			other_errors(ring, direction, route);
		}
		short_writes(ring, route);
	}
	flush_fails(ring);
	endless_storm(ring);
	storms_in_turn(ring);
	unreachable(ring);
	dmb_testing_set_filter(NULL, NULL);
	memory_unmap(&memory);
	file_close(&file);
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
