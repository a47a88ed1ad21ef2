/* SPDX-License-Identifier: MIT */
/* Running a job: one system call for a small range, otherwise a batch on a ring. */
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

/* The maximum bytes of a small request: larger ones are faster on a ring. */
#define SMALL (1U << 20)

/*
 * Return whether a range ends before the file's last partial block. That block is read through
 * staging, and a write past the end must extend the file first.
 */
static bool before_end(const struct dmb_job *job, uint64_t end)
{
	uint64_t size = job->file_size;
	struct stat stat;

	if (!size) {
		if (fstat(job->fd, &stat) || stat.st_size < 0)
			return false;
		size = (uint64_t)stat.st_size;
	}
	return end <= dmb_align_down(size, job->offset_align);
}

bool dmb_fences_signalled(const struct dmb_job *job, uint64_t start, uint64_t end)
{
	for (uint64_t slab = start / job->slab_size; slab * job->slab_size < end; slab++) {
		struct pollfd one = {
			.fd = job->slabs[slab],
			.events = job->direction == DMB_READ ? POLLOUT : POLLIN,
		};

		if (poll(&one, 1, 0) != 1 || one.revents != one.events)
			return false;
	}
	return true;
}

bool dmb_is_small(const struct dmb_job *job, uint64_t offset, uint64_t start, uint64_t size,
		  bool fence)
{
	if (!size || size > SMALL || start > job->size || size > job->size - start)
		return false;
	if ((offset | size) & (job->offset_align - 1) ||
	    (job->base + start) & (job->memory_align - 1))
		return false;
	if (job->direction == DMB_WRITE && (offset | size) & (job->page - 1))
		return false; /* see enum dmb_shared */
	if (offset > INT64_MAX - size || !before_end(job, offset + size))
		return false;
	return !fence || !job->slabs || dmb_fences_signalled(job, start, start + size);
}

int dmb_job_run_small(const struct dmb_job *job, uint64_t offset, uint64_t start, uint64_t size,
		      int fence)
{
	if (!dmb_is_small(job, offset, start, size, fence))
		return 0;
	return dmb_read_write(job->direction, job->fd, job->base + start, size, offset) ==
	       (int64_t)size;
}

/* Return whether what is known of one file and O_DIRECT holds for another one. */
static bool alike(int fd, int other)
{
	struct dmb_stat one, two;

	return !dmb_stat(fd, &one) && !dmb_stat(other, &two) && S_ISREG(two.mode) && one.mount &&
	       one.mount == two.mount && one.memory_align == two.memory_align &&
	       one.offset_align == two.offset_align;
}

int dmb_job_read_file(const struct dmb_job *job, const char *path, uint64_t offset, uint64_t start,
		      uint64_t size, int fence)
{
	struct dmb_job one = *job;
	int rc;

	/* O_NONBLOCK: do not wait for the writer of a FIFO */
	one.fd = open(path, O_RDONLY | O_DIRECT | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (one.fd < 0)
		return 0;
	rc = alike(job->fd, one.fd) && dmb_job_run_small(&one, offset, start, size, fence);
	close(one.fd);
	return rc;
}

int dmb_job_run(struct dmb_ring *ring, const struct dmb_job *job, const uint64_t *segments,
		size_t count, int timeout_ms, struct dmb_batch **batch, struct dmb_result *ret)
{
	int rc = *batch ? 0 : dmb_batch_create(ring, job, segments, count, batch);

	if (rc)
		return rc;
	rc = dmb_batch_run(*batch, timeout_ms);
	if (rc > 0)
		return rc;
	dmb_batch_drain(*batch);
	dmb_batch_get_result(*batch, ret);
	dmb_batch_destroy(*batch);
	*batch = NULL;
	return rc;
}
