/* SPDX-License-Identifier: MIT */
/*
 * Each allocation and each system call of the core fails, one after the other, and all from one on.
 * Either an error is reported, or every byte moves; and nothing is left. The linker puts the
 * functions at the beginning in the place of libc's and liburing's (tests/refused).
 */
#include "test.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "../uapi.h"

/* -- what fails */

static struct {
	unsigned first; /* the number of the call that fails, from 1; 0: none */
	bool lasting;	/* so do all after it */
	int number;	/* with this errno */
	long (*answer)(long number, const long *arguments); /* of syscall(2), or NULL */
	bool old, stuck; /* rings without features; submissions that submit nothing */
	bool block;	 /* fstat(2) reports block devices */
} refused;

static atomic_uint calls;
static atomic_bool hit;
static atomic_llong mapped;

static bool refuse(void)
{
	unsigned number;

	if (!refused.first)
		return false;
	number = atomic_fetch_add(&calls, 1) + 1;
	if (number != refused.first && !(refused.lasting && number > refused.first))
		return false;
	atomic_store(&hit, true);
	errno = refused.number;
	return true;
}

static void refuse_from(unsigned first, bool lasting, int number)
{
	atomic_store(&calls, 0);
	atomic_store(&hit, false);
	refused.lasting = lasting;
	refused.number = number;
	refused.first = first;
}

#define REFUSABLE(type, name, parameters, arguments, failed)                                       \
	type __real_##name parameters;                                                             \
	type __wrap_##name parameters;                                                             \
	type __wrap_##name parameters                                                              \
	{                                                                                          \
		return refuse() ? (failed) : __real_##name arguments;                              \
	}

REFUSABLE(void *, malloc, (size_t size), (size), NULL)
REFUSABLE(void *, calloc, (size_t count, size_t size), (count, size), NULL)
REFUSABLE(int, madvise, (void *at, size_t size, int advice), (at, size, advice), -1)
REFUSABLE(int, fstatfs, (int fd, struct statfs *ret), (fd, ret), -1)
REFUSABLE(int, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size), -1)
REFUSABLE(ssize_t, pread, (int fd, void *to, size_t size, off_t at), (fd, to, size, at), -1)
REFUSABLE(ssize_t, pwrite, (int fd, const void *from, size_t size, off_t at), (fd, from, size, at),
	  -1)
REFUSABLE(int, pthread_create,
	  (pthread_t * ret, const pthread_attr_t *attr, void *(*start)(void *), void *argument),
	  (ret, attr, start, argument), refused.number)
REFUSABLE(int, io_uring_register_buffers_update_tag,
	  (struct io_uring * uring, unsigned at, const struct iovec *iov, const __u64 *tags,
	   unsigned count),
	  (uring, at, iov, tags, count), -refused.number)
REFUSABLE(int, io_uring_register_files_update,
	  (struct io_uring * uring, unsigned at, const int *fds, unsigned count),
	  (uring, at, fds, count), -refused.number)

void *__real_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
	void *made = refuse() ? MAP_FAILED : __real_mmap(at, size, protection, flags, fd, offset);

	if (made != MAP_FAILED && !(flags & MAP_FIXED))
		atomic_fetch_add(&mapped, (long long)size);
	return made;
}

int __real_munmap(void *at, size_t size);
int __wrap_munmap(void *at, size_t size);
int __wrap_munmap(void *at, size_t size)
{
	atomic_fetch_sub(&mapped, (long long)size);
	return __real_munmap(at, size);
}

int __real_fstat(int fd, struct stat *ret);
int __wrap_fstat(int fd, struct stat *ret);
int __wrap_fstat(int fd, struct stat *ret)
{
	int rc = refuse() ? -1 : __real_fstat(fd, ret);

	if (!rc && refused.block)
		ret->st_mode = S_IFBLK | 0600;
	return rc;
}

int __real_ioctl(int fd, unsigned long request, void *argument);
int __wrap_ioctl(int fd, unsigned long request, void *argument);
int __wrap_ioctl(int fd, unsigned long request, void *argument)
{
	return refuse() ? -1 : __real_ioctl(fd, request, argument);
}

long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);
long __wrap_syscall(long number, ...)
{
	long arguments[6];
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		arguments[i] = va_arg(list, long);
	va_end(list);
	if (refuse())
		return -1;
	if (refused.answer) {
		long rc = refused.answer(number, arguments);

		if (rc != LONG_MIN)
			return rc;
	}
	return __real_syscall(number, arguments[0], arguments[1], arguments[2], arguments[3],
			      arguments[4], arguments[5]);
}

int __real_io_uring_queue_init_params(unsigned entries, struct io_uring *uring,
				      struct io_uring_params *params);
int __wrap_io_uring_queue_init_params(unsigned entries, struct io_uring *uring,
				      struct io_uring_params *params);
int __wrap_io_uring_queue_init_params(unsigned entries, struct io_uring *uring,
				      struct io_uring_params *params)
{
	int rc = refuse() ? -refused.number
			  : __real_io_uring_queue_init_params(entries, uring, params);

	if (!rc && refused.old)
		uring->features = params->features = 0;
	return rc;
}

/* The range that was flushed. */
static struct {
	off_t start, end;
} flushed;

int __wrap_sync_file_range(int fd, off_t offset, off_t size, unsigned flags);
int __wrap_sync_file_range(int fd, off_t offset, off_t size, unsigned flags)
{
	(void)fd;
	CHECK_EQUAL(flags, DMB_FLUSH_FLAGS);
	flushed.start = offset;
	flushed.end = offset + size;
	return 0;
}

int __real_io_uring_submit(struct io_uring *uring);
int __wrap_io_uring_submit(struct io_uring *uring);
int __wrap_io_uring_submit(struct io_uring *uring)
{
	return refused.stuck || refuse() ? -EAGAIN : __real_io_uring_submit(uring);
}

/* A wait may fail as one does for want of memory. It fails once only: a device ends at some time.
 */
int __real_io_uring_submit_and_wait_timeout(struct io_uring *uring, struct io_uring_cqe **cqe,
					    unsigned count, struct __kernel_timespec *time,
					    sigset_t *mask);
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *uring, struct io_uring_cqe **cqe,
					    unsigned count, struct __kernel_timespec *time,
					    sigset_t *mask);
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *uring, struct io_uring_cqe **cqe,
					    unsigned count, struct __kernel_timespec *time,
					    sigset_t *mask)
{
	if (!refused.lasting && refuse())
		return -refused.number;
	return __real_io_uring_submit_and_wait_timeout(uring, cqe, count, time, mask);
}

/* -- transfers */

static long cached; /* pages, or -errno */

static long answer_cachestat(long number, const long *arguments)
{
	if (number != DMB_SYS_CACHESTAT)
		return LONG_MIN;
	if (cached < 0) {
		errno = (int)-cached;
		return -1;
	}
	((struct dmb_cachestat *)arguments[2])->cached = (uint64_t)cached;
	return 0;
}

enum { FILE_SIZE = 20 * PAGE + 100, MEMORY = 24 * PAGE };

static const uint64_t segments[] = {
	100,	   50,	      3 * PAGE,	      /* edges */
	5 * PAGE,  6 * PAGE,  6 * PAGE,	      /* whole blocks */
	12 * PAGE, 13 * PAGE, 8 * PAGE + 100, /* up to the end of the file */
};

/* A ring that refuses requests, and on which some end short or with EAGAIN. */
static const struct dmb_backend_ops *real_ops;
static struct dmb_backend_ops refusing_ops;

static int refusing_issue(struct dmb_ring *ring, struct dmb_io *io)
{
	return refuse() ? -refused.number : real_ops->issue(ring, io);
}

static int32_t some(void *arg, const struct dmb_completion *completion)
{
	unsigned number = ++*(unsigned *)arg;

	if (number % 5 == 2)
		return -EAGAIN;
	if (number % 3 == 1 && completion->result >= 2 * PAGE)
		return PAGE;
	return completion->result;
}

struct kind {
	int backend;
	unsigned depth, flags;
};

static const struct kind kinds[] = {
	{DMB_BACKEND_URING, 8, 0},
	{DMB_BACKEND_URING, 8, DMB_RING_SINGLE_ISSUER},
	{DMB_BACKEND_THREADS, 3, 0},
	{DMB_BACKEND_THREADS, 0, 0},
};

/* Return 0 or -errno, and the result of the transfer where there was one. */
static int attempt(const struct kind *kind, const struct dmb_job *job, struct dmb_result *result)
{
	unsigned completions = 0;
	struct dmb_batch *batch;
	struct dmb_ring *ring;
	int rc = dmb_ring_create(kind->backend, kind->depth, kind->flags, &ring);

	*result = (struct dmb_result){0};
	if (rc)
		return rc;
	dmb_ring_register_buffer(ring, 0, job->base, job->size); /* optional; so is the next */
	dmb_ring_register_file(ring, 0, job->fd);
	dmb_testing_set_filter(some, &completions);
	real_ops = ring->ops;
	refusing_ops = *real_ops;
	refusing_ops.issue = refusing_issue;
	ring->ops = &refusing_ops;
	rc = dmb_batch_create(ring, job, segments, 3, &batch);
	if (!rc) {
		do
			rc = dmb_batch_run(batch, 20); /* what was not submitted is, then */
		while (rc == 1);
		dmb_batch_drain(batch);
		dmb_batch_get_result(batch, result);
		dmb_batch_destroy(batch);
	}
	ring->ops = real_ops;
	dmb_testing_set_filter(NULL, NULL);
	dmb_ring_run_deferred(ring);
	dmb_ring_destroy(ring);
	return rc ? rc : -result->error;
}

/* Let each call fail until none is left that does. Return how many there were. */
static unsigned each_call(const struct kind *kind, int direction, int route, bool stale,
			  bool lasting, int number)
{
	const uint64_t total = segments[2] + segments[5] + segments[8];

	struct memory memory;
	struct dmb_job job;
	struct file file;
	unsigned call = 0;

	if (!file_open(&file, FILE_SIZE))
		return UINT_MAX;
	memory_map(&memory, MEMORY);
	job = make_job(&file, &memory, direction, route);
	job.depth = 3;
	job.block = 2 * PAGE;
	job.stale_cache = stale;
	do {
		struct dmb_result result;
		long long before = atomic_load(&mapped);
		int rc;

		if (direction == DMB_READ)
			memset(memory.bytes, POISON, memory.size);
		else
			random_bytes(memory.bytes, memory.size);
		context(lasting ? "all from this one on" : "this one", ++call);
		refused.answer = stale ? answer_cachestat : NULL;
		cached = 5;
		refuse_from(call, lasting, number);
		rc = attempt(kind, &job, &result);
		refused.first = 0;
		refused.answer = NULL;
		CHECK_EQUAL(atomic_load(&mapped), before);
		if (!rc)
			CHECK_EQUAL(result.nbytes, total);
		else
			CHECK(atomic_load(&hit));
		check_moved(&file, &memory, segments, 3, direction, result.nbytes, false);
	} while (atomic_load(&hit));
	memory_unmap(&memory);
	file_close(&file);
	return call - 1;
}

static void every_call(void)
{
	static const int numbers[] = {ENOMEM, EINVAL, EAGAIN};

	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
		if (kinds[i].backend == DMB_BACKEND_URING && dmb_uring_probe())
			continue; /* the other tests skip, and say how to enable them */
		for (int route = DMB_DIRECT; route <= DMB_BUFFERED; route++)
			for (int k = 0; k < 3; k++) {
				const struct kind *one = &kinds[i];
				bool lasting = k == 1;
				int number = numbers[k];

				if (k && (i % 2 || route != DMB_STAGED))
					continue;

				CHECK(each_call(one, DMB_READ, route, false, lasting, number) > 4);
				CHECK(each_call(one, DMB_WRITE, route, false, lasting, number) > 4);
			}
	}
	if (!dmb_uring_probe()) /* pages that stay in the cache: it pauses for them each time */
		CHECK(each_call(kinds, DMB_WRITE, DMB_DIRECT, true, false, ENOMEM) > 4);
}

/* -- rings of old kernels, and rings that are full */

static void old_kernels(void)
{
	struct dmb_ring *ring;

	context("old kernels", 0);
	if (dmb_uring_probe())
		return;
	refused.old = true;
	CHECK_EQUAL(dmb_uring_probe(), -ENOSYS);
	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_URING, 8, 0, &ring), -ENOSYS);
	refused.old = false;
	refuse_from(1, true, EINVAL); /* no flag is known */
	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_URING, 8, 0, &ring), -ENOMEM);
	refuse_from(2, true, EINVAL);
	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_URING, 8, 0, &ring), -EINVAL);
	refuse_from(1, false, EPERM);
	CHECK_EQUAL(dmb_uring_probe(), -EPERM);
	refused.first = 0;
}

/* The kernel takes no submissions: the request is refused, and a cancellation is given up. */
static void full_ring(void)
{
	uint8_t byte;
	struct dmb_io io = {.direction = DMB_READ,
			    .fd = -1,
			    .file_slot = -1,
			    .buffer_slot = -1,
			    .address = &byte,
			    .length = 1}; /* clang-format off */
	struct dmb_ring *ring; /* clang-format on */
	int rc = 0;

	context("a full ring", 0);
	if (dmb_uring_probe())
		return;
	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_URING, 1, 0, &ring), 0);
	refused.stuck = true;
	for (int i = 0; i < 3 && !rc; i++)
		rc = ring->ops->issue(ring, &io);
	CHECK_EQUAL(rc, -EBUSY);
	ring->ops->cancel(ring, &io);
	refused.stuck = false;
	CHECK_EQUAL(ring->ops->wait(ring, 30000), 0);
	while (ring->ops->reap(ring))
		CHECK_EQUAL(io.result, -EBADF);
	dmb_ring_destroy(ring);
}

/* -- system calls with other results */

static struct dmb_statx reported[2]; /* of one descriptor, and of any other one */
static int first_fd;

static long answer_statx(long number, const long *arguments)
{
	if (number != SYS_statx)
		return LONG_MIN;
	memcpy((void *)arguments[4], &reported[arguments[0] != first_fd], sizeof(*reported));
	return 0;
}

static long answer_register(long number, const long *arguments)
{
	return number == SYS_io_uring_register && arguments[1] == DMB_REGISTER_BUFFERS_UPDATE
		       ? cached
		       : LONG_MIN;
}

static void statx_results(void)
{
	uint32_t align[2] = {1, 1};
	struct dmb_stat stat;

	context("statx", 0);
	reported[0] = reported[1] = (struct dmb_statx){0};
	refused.answer = answer_statx;
	CHECK_EQUAL(dmb_statx_dio(0, align), 0);
	CHECK_EQUAL(align[0] + align[1], 0);
	CHECK_EQUAL(dmb_stat(0, &stat), 0);
	CHECK_EQUAL(stat.mount, 0);
	CHECK_EQUAL(stat.allocated, 0);
	reported[0].blocks = reported[1].blocks = 8;
	reported[0].mask = reported[1].mask = DMB_STATX_DIOALIGN;
	CHECK_EQUAL(dmb_statx_dio(0, align), -EOPNOTSUPP);
	CHECK_EQUAL(dmb_stat(0, &stat), 0);
	CHECK_EQUAL(stat.allocated, 1);
	refused.answer = NULL;
}

/* Another file is read with what is known of the first only where statx reports the same of both.
 */
static void other_files(void)
{
	const struct dmb_statx same = {
		.mask = DMB_STATX_DIOALIGN | DMB_STATX_MNT_ID_UNIQUE,
		.mode = S_IFREG | 0600,
		.size = FILE_SIZE,
		.mnt_id = 7,
		.dio_mem_align = 512,
		.dio_offset_align = 512,
	};
	char path[64];
	struct memory memory;
	struct dmb_job job;
	struct file file;

	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	job = make_job(&file, &memory, DMB_READ, DMB_DIRECT);
	first_fd = job.fd;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", file.plain);
	refused.answer = answer_statx;
	for (int round = 0; round < 6; round++) {
		context("another file", (unsigned)round);
		reported[0] = reported[1] = same;
		if (round == 1)
			reported[1].mode = S_IFIFO | 0600;
		else if (round == 2)
			reported[0].mnt_id = reported[1].mnt_id = 0;
		else if (round == 3)
			reported[1].mnt_id = 8;
		else if (round == 4)
			reported[1].dio_mem_align = 4096;
		else if (round == 5)
			reported[1].dio_offset_align = 4096;
		CHECK_EQUAL(dmb_job_read_file(&job, path, 0, 0, PAGE, 0), round == 0);
	}
	for (unsigned call = 1; call <= 2; call++) {
		refuse_from(call, false, EIO);
		CHECK_EQUAL(dmb_job_read_file(&job, path, 0, 0, PAGE, 0), 0);
		refused.first = 0;
	}
	refused.answer = NULL;
	memory_unmap(&memory);
	file_close(&file);
}

static void registrations(void)
{
	static const long counts[] = {0, 1, -1};
	static const int wanted[] = {-EIO, 0, -EMFILE};
	struct dmb_ring *ring;

	context("registrations", 0);
	if (dmb_uring_probe())
		return;
	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_URING, 8, 0, &ring), 0);
	CHECK_EQUAL(dmb_ring_register_buffer(ring, DMB_BUFFER_SLOTS, 0, 0), -EINVAL);
	CHECK_EQUAL(dmb_ring_register_dmabuf(ring, DMB_BUFFER_SLOTS, -1, -1), -EINVAL);
	refused.answer = answer_register;
	for (int i = 0; i < 3; i++) {
		cached = counts[i];
		errno = EMFILE;
		CHECK_EQUAL(dmb_ring_register_dmabuf(ring, 0, 0, 1), wanted[i]);
	}
	refused.answer = NULL;
	ring->info.buffer_table = ring->info.file_table = -EMFILE;
	CHECK_EQUAL(dmb_ring_register_buffer(ring, 0, 0, 0), -EMFILE);
	CHECK_EQUAL(dmb_ring_register_dmabuf(ring, 0, 0, 1), -EMFILE);
	CHECK_EQUAL(dmb_ring_register_file(ring, 0, 0), -EMFILE);
	dmb_ring_destroy(ring);
}

/* Where pages stay in the cache, the range is written again by pwrite(2), which drops them. */
static void written_pages(void)
{
	static const long results[] = {0, -ENOSYS, 5};

	for (int i = 0; i < 3 && !dmb_uring_probe(); i++) {
		uint64_t segment[] = {PAGE, PAGE, 8 * PAGE};
		struct dmb_result result;
		struct memory memory;
		struct dmb_ring *ring;
		struct dmb_job job;
		struct file file;

		context("written pages", (unsigned)i);
		if (!file_open(&file, FILE_SIZE))
			return;
		memory_map(&memory, MEMORY);
		random_bytes(memory.bytes, memory.size);
		job = make_job(&file, &memory, DMB_WRITE, DMB_DIRECT);
		job.stale_cache = 1;
		CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_URING, 8, 0, &ring), 0);
		cached = results[i];
		refused.answer = answer_cachestat;
		result = transfer(ring, &job, segment, 1);
		refused.answer = NULL;
		CHECK_EQUAL(result.error, 0);
		CHECK_EQUAL(result.nbytes, segment[2]);
		CHECK_EQUAL(result.copied, i == 2 ? segment[2] : 0);
		check_moved(&file, &memory, segment, 1, DMB_WRITE, segment[2], false);
		dmb_ring_destroy(ring);
		memory_unmap(&memory);
		file_close(&file);
	}
}

/* -- the rest: a call of one function each */

static void single_calls(void)
{
	struct dmb_policy policy;
	struct dmb_measure measure;
	struct dmb_job job = {.depth = 1,
			      .block = PAGE,
			      .offset_align = 1,
			      .memory_align = 1,
			      .page = PAGE,
			      .size = PAGE,
			      .direction = DMB_WRITE,
			      .plain_fd = 0,
			      .fd = -1,
			      .route = DMB_BUFFERED}; /* clang-format off */
	struct dmb_stage stage = {0}; /* clang-format on */
	const uint64_t segment[] = {0, 0, PAGE, PAGE, 0, 0};
	int64_t step = (int64_t)dmb_huge_page();
	long long before = atomic_load(&mapped);

	context("single calls", 0);
	refuse_from(1, true, EIO);
	CHECK_EQUAL(dmb_statfs_type(0), -EIO);
	CHECK_EQUAL(dmb_fallocate(0, 0, PAGE, 1), -EIO);
	CHECK_EQUAL(dmb_populate(0, PAGE), -EIO);
	CHECK_EQUAL(dmb_collapse(0, (uint64_t)step), -EIO);
	CHECK_EQUAL(dmb_count_elsewhere(0, PAGE, PAGE, 0), -EIO);
	CHECK_EQUAL(dmb_policy_bind(0, &policy), -EIO);
	CHECK_EQUAL(dmb_bind_node(0, PAGE, 0), -EIO);
	CHECK_EQUAL(dmb_stage_reserve(&stage, 4, PAGE, true), -EIO);
	CHECK_EQUAL(dmb_job_measure(&job, segment, 1, &measure), -EIO);
	CHECK_EQUAL(dmb_job_run_small(&job, 0, 0, PAGE, 0), 0); /* fstat fails */
	refuse_from(2, true, EIO);
	CHECK_EQUAL(dmb_policy_bind(0, &policy), -EIO);
	policy.mode = 0;
	CHECK_EQUAL(dmb_policy_restore(&policy), -EIO);
	refuse_from(2, false, ENOMEM); /* room for huge pages, and none in it */
	CHECK_EQUAL(dmb_stage_reserve(&stage, 4, (size_t)step, true), -ENOMEM);
	refuse_from(3, true, ENOMEM); /* huge pages, which cannot be had; then no list */
	CHECK_EQUAL(dmb_stage_reserve(&stage, 1, (size_t)step, true), -ENOMEM);
	refuse_from(1, false, ENOMEM); /* no room: ordinary pages */
	CHECK_EQUAL(dmb_stage_reserve(&stage, 1, (size_t)step, true), 0);
	refused.first = 0;
	CHECK(dmb_stage_take(&stage));
	CHECK(!dmb_stage_take(&stage));
	dmb_stage_release(&stage);
	CHECK_EQUAL(dmb_stage_reserve(&stage, 4, (size_t)step, true), 0);
	memset(stage.memory, 1, stage.size);
	dmb_stage_release(&stage);
	CHECK_EQUAL(dmb_stage_reserve(&stage, 4, SIZE_MAX / 2, true), -ENOMEM);
	CHECK_EQUAL(dmb_stage_reserve(&stage, 16, (size_t)step, true), 0); /* too many for huge */
	dmb_stage_release(&stage);
	CHECK_EQUAL(atomic_load(&mapped), before);
	CHECK_EQUAL(dmb_collapse((uint64_t)step, PAGE), 0); /* less than a huge page */
	CHECK_EQUAL(dmb_job_measure(&job, segment, 0, &measure), 0);
	refused.block = true;
	CHECK(dmb_job_measure(&job, segment, 1, &measure) < 0); /* it has no size of a device */
	refused.block = false;
}

/* A write waits for readers and writers of the dma-buf, a read of the file for both too. */
static void fences(void)
{
	int32_t slab = eventfd(0, EFD_CLOEXEC);
	struct dmb_job job = {.slabs = &slab, .slab_size = PAGE, .size = PAGE};

	context("fences", 0);
	for (int direction = DMB_READ; direction <= DMB_WRITE; direction++) {
		job.direction = direction;
		CHECK_EQUAL(dmb_fences_signalled(&job, 0, PAGE), direction == DMB_READ);
	}
	CHECK_EQUAL(eventfd_write(slab, 1), 0); /* readable, as a dma-buf without writers is */
	CHECK(dmb_fences_signalled(&job, 0, PAGE));
	close(slab);
}

/* The edges of one write may be further apart than a flush can say: the rest of the file is. */
static void far_edges(struct dmb_ring *ring)
{
	const uint64_t far = 5ULL << 30, both[] = {100, 100, 50, far + 100, 200, 50};
	struct memory memory;
	struct dmb_job job;
	struct file file;
	uint8_t got[50];

	context("far edges", 0);
	if (!file_open(&file, FILE_SIZE))
		return;
	CHECK_EQUAL(ftruncate(file.plain, (off_t)far + PAGE), 0);
	memory_map(&memory, MEMORY);
	random_bytes(memory.bytes, memory.size);
	job = make_job(&file, &memory, DMB_WRITE, DMB_DIRECT);
	job.file_size = far + PAGE;
	CHECK_EQUAL(transfer(ring, &job, both, 2).nbytes, 100);
	for (int i = 0; i < 2; i++) {
		CHECK_EQUAL(pread(file.plain, got, 50, (off_t)both[3 * i]), 50);
		CHECK(!memcmp(got, memory.bytes + both[3 * i + 1], 50));
	}
	memory_unmap(&memory);
	file_close(&file);
}

/* A flush covers every edge that was written. */
static void flush_of_edges(void)
{
	static const struct kind in_place = {DMB_BACKEND_THREADS, 0, 0};
	const uint64_t over_a_page[] = {100, 0, PAGE};
	struct dmb_result result;
	struct dmb_ring *ring;
	struct memory memory;
	struct dmb_job job;
	struct file file;

	context("flush of edges", 0);
	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	job = make_job(&file, &memory, DMB_WRITE, DMB_DIRECT);
	flushed.start = flushed.end = 0;
	CHECK_EQUAL(attempt(&in_place, &job, &result), 0);
	CHECK(flushed.start <= 100 && flushed.start >= 0);
	CHECK_EQUAL(flushed.end, dmb_align_up(segments[6] + segments[8], PAGE));
	context("flush of edges", 1); /* one of several requests, which ends in another page */
	job.block = job.offset_align;
	CHECK_EQUAL(dmb_ring_create(in_place.backend, in_place.depth, in_place.flags, &ring), 0);
	CHECK_EQUAL(transfer(ring, &job, over_a_page, 1).nbytes, over_a_page[2]);
	dmb_ring_destroy(ring);
	CHECK_EQUAL(flushed.start, 0);
	CHECK_EQUAL(flushed.end, 2 * PAGE);
	memory_unmap(&memory);
	file_close(&file);
}

/* A write of nothing is an error of the device, and a hole needs memory that the CPU can map. */
static int32_t nothing(void *arg, const struct dmb_completion *completion)
{
	(void)arg;
	return completion->direction == DMB_WRITE ? 0 : completion->result;
}

static void no_progress(struct dmb_ring *ring)
{
	const uint64_t middle[] = {PAGE, PAGE, PAGE}, edge[] = {100, 100, 50};
	const int32_t slot = 0;
	struct dmb_batch *batch;
	struct memory memory;
	struct dmb_job job;
	struct file file;

	context("no progress", 0);
	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	job = make_job(&file, &memory, DMB_WRITE, DMB_DIRECT);
	job.stale_cache = 1;
	dmb_testing_set_filter(nothing, NULL);
	CHECK_EQUAL(transfer(ring, &job, middle, 1).error, EIO);
	CHECK_EQUAL(transfer(ring, &job, edge, 1).error, EIO);
	dmb_testing_set_filter(NULL, NULL);
	job = make_job(&file, &memory, DMB_READ, DMB_NATIVE);
	job.base = 0;
	job.slots = &slot;
	job.slot_size = MEMORY;
	job.extents = (const struct dmb_extent[]){{0}};
	CHECK_EQUAL(transfer(ring, &job, middle, 1).error, EFAULT);
	job = make_job(&file, &memory, DMB_WRITE, DMB_BUFFERED);
	job.stale_cache = 1;
	CHECK_EQUAL(transfer(ring, &job, middle, 1).nbytes, PAGE);
	job.memory_align = 2 * job.block;
	CHECK_EQUAL(dmb_batch_create(ring, &job, middle, 1, &batch), -EINVAL);
	job.memory_align = job.nsid = 1;
	job.lba_shift = 9;
	CHECK_EQUAL(dmb_batch_create(ring, &job, middle, 1, &batch), -EINVAL);
	memory_unmap(&memory);
	file_close(&file);
}

/* A descriptor that is none is refused, and the ring goes on without an eventfd. */
static void eventfds(struct dmb_ring *ring)
{
	struct dmb_done done;
	uint32_t count = 0;

	context("eventfds", 0);
	if (ring->info.backend == DMB_BACKEND_URING)
		CHECK_EQUAL(dmb_ring_set_eventfd(ring, 1 << 20), -EBADF);
	CHECK_EQUAL(dmb_ring_poll(ring, &done, 1, &count), 0);
	CHECK_EQUAL(count, 0);
	dmb_ring_probe_native(ring);
}

int main(void)
{
	every_call();
	old_kernels();
	full_ring();
	statx_results();
	other_files();
	registrations();
	written_pages();
	single_calls();
	fences();
	flush_of_edges();
	on_each_ring(far_edges);
	on_each_ring(no_progress);
	on_each_ring(eventfds);
	return finish();
}
