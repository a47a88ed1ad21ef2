/* SPDX-License-Identifier: MIT */
/* Running a job: what goes by one system call, every byte, and what is left to a batch. */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "test.h"

enum { PAGES = 8 };

static void read_and_compare(const struct file *file, const struct memory *memory,
			     const struct dmb_job *job, uint64_t offset, uint64_t start,
			     uint64_t size)
{
	memset(memory->bytes, POISON, memory->size);
	CHECK_EQUAL(dmb_job_run_small(job, offset, start, size, 1), 1);
	CHECK(!memcmp(memory->bytes + start, file->bytes + offset, size));
	for (uint64_t i = 0; i < memory->size; i++)
		if (i < start || i >= start + size)
			CHECK_EQUAL(memory->bytes[i], POISON);
}

static void refused(const struct memory *memory, const struct dmb_job *job, uint64_t offset,
		    uint64_t start, uint64_t size)
{
	memset(memory->bytes, POISON, memory->size);
	CHECK_EQUAL(dmb_job_run_small(job, offset, start, size, 1), 0);
	for (uint64_t i = 0; i < memory->size; i++)
		CHECK_EQUAL(memory->bytes[i], POISON);
}

/* A job as a link keeps it: the size of a regular file is read each time. */
static struct dmb_job small_job(const struct file *file, const struct memory *memory, int direction)
{
	struct dmb_job job = make_job(file, memory, direction, DMB_DIRECT);

	job.file_size = 0;
	return job;
}

static void small_reads(struct file *file, struct memory *memory)
{
	struct dmb_job job = small_job(file, memory, DMB_READ);
	const uint64_t block = job.offset_align, blocks = PAGES * PAGE / block;

	for (unsigned round = 0; round < 64; round++) {
		uint64_t start = random_below(PAGES) * PAGE, offset = random_below(blocks);
		uint64_t size = 1 + random_below((memory->size - start) / block);

		context("small reads", round);
		size = dmb_min(size, blocks - offset);
		read_and_compare(file, memory, &job, offset * block, start, size * block);
	}
	context("refused", 0);
	refused(memory, &job, 0, 0, 0);
	refused(memory, &job, 0, 0, PAGE - 1);
	refused(memory, &job, 1, 0, PAGE);
	refused(memory, &job, 0, 1, PAGE);
	refused(memory, &job, 0, memory->size, PAGE);
	refused(memory, &job, 0, 0, memory->size + PAGE);
	refused(memory, &job, 0, UINT64_MAX - PAGE + 1, PAGE);
	refused(memory, &job, UINT64_MAX - PAGE + 1, 0, PAGE);
	refused(memory, &job, INT64_MAX - PAGE + 1, 0, PAGE);
	refused(memory, &job, PAGES * PAGE, 0, PAGE); /* the block that holds the end */
	job.fd = -1;
	refused(memory, &job, 0, 0, PAGE);
	job = small_job(file, memory, DMB_READ);
	job.base = 0;
	refused(memory, &job, 0, 0, PAGE);
}

static void a_file_that_shrinks(struct file *file, struct memory *memory)
{
	struct dmb_job job = small_job(file, memory, DMB_READ);

	context("a file that shrinks", 0);
	read_and_compare(file, memory, &job, 6 * PAGE, 0, 2 * PAGE);
	CHECK_EQUAL(ftruncate(file->plain, 7 * PAGE + 100), 0);
	refused(memory, &job, 6 * PAGE, 0, 2 * PAGE);
	read_and_compare(file, memory, &job, 6 * PAGE, 0, PAGE);
	job.file_size = PAGES * PAGE; /* a device that became smaller gives a short count */
	CHECK_EQUAL(dmb_job_run_small(&job, 7 * PAGE, 0, PAGE, 1), 0);
}

static void small_writes(struct file *file, struct memory *memory)
{
	struct dmb_job job = small_job(file, memory, DMB_WRITE);

	context("small writes", 0);
	random_bytes(memory->bytes, memory->size);
	CHECK_EQUAL(dmb_job_run_small(&job, 2 * PAGE, PAGE, 3 * PAGE, 1), 1);
	memcpy(file->bytes + 2 * PAGE, memory->bytes + PAGE, 3 * PAGE);
	CHECK_EQUAL(dmb_job_run_small(&job, PAGES * PAGE, 0, PAGE, 1), 0); /* past the end */
	CHECK_EQUAL(dmb_job_run_small(&job, 100, 0, PAGE, 1), 0);
	file_check(file);
}

/* Files that are opened, read and closed in one call, by what is known of another one. */
static void other_files(const struct file *file, const struct memory *memory)
{
	const char *const others[] = {"/nowhere", "/dev/zero", "/proc/self/status", "/"};
	struct dmb_job job = small_job(file, memory, DMB_READ);
	struct dmb_stat stat;
	char path[32];

	context("other files", 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", file->plain);
	CHECK_EQUAL(dmb_stat(file->direct, &stat), 0);
	memset(memory->bytes, POISON, memory->size);
	for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
		CHECK_EQUAL(dmb_job_read_file(&job, others[i], 0, 0, PAGE, 1), 0);
	CHECK_EQUAL(dmb_job_read_file(&job, path, PAGES * PAGE, 0, PAGE, 1), 0); /* the end */
	CHECK_EQUAL(dmb_job_read_file(&job, path, 1, 0, PAGE, 1), 0);
	for (uint64_t i = 0; i < memory->size; i++)
		CHECK_EQUAL(memory->bytes[i], POISON);
	if (!stat.mount)
		return; /* before Linux 6.8 */
	CHECK_EQUAL(dmb_job_read_file(&job, path, PAGE, 2 * PAGE, PAGE, 1), 1);
	CHECK(!memcmp(memory->bytes + 2 * PAGE, file->bytes + PAGE, PAGE));
	job.fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC); /* another mount */
	CHECK_EQUAL(dmb_job_read_file(&job, path, 0, 0, PAGE, 1), 0);
	close(job.fd);
}

/* An eventfd is readable when it was written to, and writable: a dma-buf's fences in one number. */
static void fences(struct file *file, struct memory *memory)
{
	struct dmb_job job = small_job(file, memory, DMB_WRITE);
	int32_t fds[2] = {eventfd(0, EFD_CLOEXEC), eventfd(0, EFD_CLOEXEC)};

	context("fences", 0);
	job.slabs = fds;
	job.slab_size = memory->size / 2;
	CHECK_EQUAL(dmb_job_run_small(&job, 0, 0, PAGE, 1), 0); /* its writers are not done */
	CHECK_EQUAL(dmb_job_run_small(&job, 0, 0, PAGE, 0), 1);
	eventfd_write(fds[1], 1);
	CHECK_EQUAL(dmb_job_run_small(&job, 0, 0, PAGE, 1), 0);
	CHECK_EQUAL(dmb_job_run_small(&job, 0, job.slab_size, PAGE, 1), 1);
	CHECK_EQUAL(dmb_job_run_small(&job, 0, job.slab_size - PAGE, 2 * PAGE, 1), 0);
	eventfd_write(fds[0], 1);
	CHECK_EQUAL(dmb_job_run_small(&job, 0, 0, PAGE, 1), 1);
	CHECK_EQUAL(dmb_job_run_small(&job, 0, job.slab_size - PAGE, 2 * PAGE, 1), 1);
	close(fds[0]);
	CHECK_EQUAL(dmb_job_run_small(&job, 0, 0, PAGE, 1), 0);
	close(fds[1]);
}

/* In slices until it is done, or ended early by a drain between two of them. */
static void slices(struct dmb_ring *ring)
{
	struct memory memory;
	struct file file;

	if (!file_open(&file, PAGES * PAGE + 100))
		return;
	memory_map(&memory, PAGES * PAGE);
	for (unsigned round = 0; round < 32; round++) {
		int direction = (int)(round & 1), route = DMB_DIRECT + (int)random_below(3);
		struct dmb_job job = make_job(&file, &memory, direction, route);
		uint64_t segments[9], total = 0;
		struct dmb_batch *batch = NULL;
		struct dmb_result result;
		bool drained = false;
		int rc;

		context("slices", round);
		random_segments(segments, 3, file.size, memory.size, direction);
		for (int i = 0; i < 3; i++)
			total += segments[3 * i + 2];
		random_bytes(memory.bytes, memory.size);
		if (direction == DMB_READ)
			memset(memory.bytes, POISON, memory.size);
		while ((rc = dmb_job_run(ring, &job, segments, 3, 0, &batch, &result)) == 1) {
			CHECK(batch);
			drained = drained || (round & 2 && !random_below(3));
			if (drained)
				dmb_batch_drain(batch);
		}
		CHECK_EQUAL(rc, 0);
		CHECK(!batch);
		CHECK_EQUAL(result.error, 0);
		if (!drained)
			CHECK_EQUAL(result.nbytes, total);
		check_moved(&file, &memory, segments, 3, direction, result.nbytes, false);
	}
	memory_unmap(&memory);
	file_close(&file);
}

static void invalid(struct dmb_ring *ring)
{
	const uint64_t segment[3] = {0, 0, PAGE};
	struct dmb_batch *batch = NULL;
	struct dmb_job job = {0};
	struct dmb_result result;

	CHECK_EQUAL(dmb_job_run(ring, &job, segment, 1, 0, &batch, &result), -EINVAL);
	CHECK(!batch);
}

static void test(struct dmb_ring *ring)
{
	slices(ring);
	invalid(ring);
}

int main(void)
{
	struct memory memory;
	struct file file;

	if (!file_open(&file, PAGES * PAGE + 100))
		return finish();
	memory_map(&memory, PAGES * PAGE);
	small_reads(&file, &memory);
	a_file_that_shrinks(&file, &memory);
	file_close(&file);
	if (!file_open(&file, PAGES * PAGE + 100))
		return finish();
	small_writes(&file, &memory);
	other_files(&file, &memory);
	fences(&file, &memory);
	file_close(&file);
	memory_unmap(&memory);
	on_each_ring(test);
	return finish();
}
