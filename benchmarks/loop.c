/* SPDX-License-Identifier: MIT */
/*
 * Reads a file by a list of requests through io_uring, with one registered buffer and a registered
 * file: what a C programmer would write, and the mark for read_segments.
 *
 *     loop FILE DEPTH MEMORY TOTAL HUGE < REQUESTS
 *
 * MEMORY bytes of a mapped and populated memfd (of huge pages where HUGE is 1) are the destination.
 * REQUESTS are triples of 64-bit numbers: file offset, offset in memory, bytes. They are done over
 * and over until TOTAL bytes have moved, the first DEPTH of them once before. Prints bytes a
 * second.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct request {
	uint64_t offset, place, size;
};

static void fail(const char *what, int number)
{
	fprintf(stderr, "loop: %s: %s\n", what, strerror(number));
	exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static struct request *read_requests(size_t *ret)
{
	size_t room = 1 << 20, count = 0;
	struct request *requests = malloc(room * sizeof(*requests));

	while (requests && fread(&requests[count], sizeof(*requests), 1, stdin) == 1) {
		if (++count == room)
			requests = realloc(requests, (room *= 2) * sizeof(*requests));
	}
	if (!requests || !count)
		fail("no requests", ENOMEM);
	*ret = count;
	return requests;
}

static char *map_memory(size_t size, int huge)
{
	int fd = memfd_create("loop", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
	char *memory;

	if (fd < 0 || ftruncate(fd, size))
		fail("memfd", errno);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (memory == MAP_FAILED)
		fail("mmap", errno);
	return memory;
}

static void set_up(struct io_uring *ring, unsigned depth, int fd, char *memory, size_t size)
{
	struct iovec area = {memory, size};
	unsigned flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
	int rc = io_uring_queue_init(depth, ring, flags);

	if (rc == -EINVAL) /* before Linux 6.1 */
		rc = io_uring_queue_init(depth, ring, 0);
	if (rc)
		fail("io_uring_queue_init", -rc);
	rc = io_uring_register_buffers(ring, &area, 1);
	if (rc)
		fail("io_uring_register_buffers", -rc);
	rc = io_uring_register_files(ring, &fd, 1);
	if (rc)
		fail("io_uring_register_files", -rc);
}

/* All of the requests, `depth` of them in flight. */
static uint64_t run(struct io_uring *ring, unsigned depth, char *memory,
		    const struct request *requests, size_t count)
{
	uint64_t moved = 0;
	size_t next = 0, done = 0;

	while (done < count) {
		struct io_uring_cqe *cqe;
		unsigned head, seen = 0;
		int rc;

		while (next < count && next - done < depth) {
			struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
			const struct request *request = &requests[next];

			io_uring_prep_read_fixed(sqe, 0, memory + request->place, request->size,
						 request->offset, 0);
			sqe->flags |= IOSQE_FIXED_FILE;
			sqe->user_data = next++;
		}
		rc = io_uring_submit_and_wait(ring, 1);
		if (rc < 0)
			fail("io_uring_submit_and_wait", -rc);
		io_uring_for_each_cqe(ring, head, cqe)
		{
			if (cqe->res < 0)
				fail("read", -cqe->res);
			if ((uint64_t)cqe->res != requests[cqe->user_data].size)
				fail("short read", EIO);
			moved += cqe->res;
			seen++;
		}
		io_uring_cq_advance(ring, seen);
		done += seen;
	}
	return moved;
}

int main(int argc, char **argv)
{
	struct io_uring ring;
	struct request *requests;
	uint64_t total, moved = 0;
	size_t count, size;
	unsigned depth;
	char *memory;
	double begun;
	int fd;

	if (argc != 6)
		fail("usage: loop FILE DEPTH MEMORY TOTAL HUGE < REQUESTS", EINVAL);
	depth = atoi(argv[2]);
	size = strtoull(argv[3], NULL, 10);
	total = strtoull(argv[4], NULL, 10);
	requests = read_requests(&count);
	fd = open(argv[1], O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		fail(argv[1], errno);
	memory = map_memory(size, atoi(argv[5]));
	set_up(&ring, depth, fd, memory, size);
	run(&ring, depth, memory, requests, count < depth ? count : depth);
	begun = now();
	while (moved < total)
		moved += run(&ring, depth, memory, requests, count);
	printf("%.0f\n", moved / (now() - begun));
	return 0;
}
