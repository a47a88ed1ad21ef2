/* SPDX-License-Identifier: MIT */
/* Show that an eventfd of an io_uring with IORING_SETUP_DEFER_TASKRUN stops being signalled.

     gcc -O2 -o uring_eventfd uring_eventfd.c -luring && ./uring_eventfd DEVICE

   DEVICE is a block device whose driver blocks, so that a request with REQ_NOWAIT ends with EAGAIN:
   null_blk with memory_backed=1. The program submits REQUESTS reads of 8 MiB. It then does what an
   event loop does: wait for the eventfd, read it, io_uring_get_events(), take the completions. The
   second run does the same with IORING_SETUP_TASKRUN_FLAG, and asks again while the flag is set. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

enum { REQUESTS = 64, SIZE = 8 << 20, PATIENCE_MS = 30000 };

static void check(int rc, const char *what)
{
	if (rc < 0) {
		fprintf(stderr, "%s: %s\n", what, strerror(rc == -1 ? errno : -rc));
		exit(1);
	}
}

static unsigned take(struct io_uring *ring)
{
	struct io_uring_cqe *cqes[REQUESTS];
	unsigned count = io_uring_peek_batch_cqe(ring, cqes, REQUESTS);

	for (unsigned i = 0; i < count; i++)
		check(cqes[i]->res, "read");
	io_uring_cq_advance(ring, count);
	return count;
}

static void run(const char *path, unsigned flag)
{
	int fd = open(path, O_RDONLY | O_DIRECT), event = eventfd(0, EFD_NONBLOCK);
	void *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned done = 0, wakes = 0, extra = 0;
	struct pollfd waiting = {.fd = event, .events = POLLIN};
	struct io_uring ring;
	eventfd_t value;

	check(fd, path);
	check(io_uring_queue_init(REQUESTS, &ring,
				  IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | flag),
	      "io_uring_queue_init");
	check(io_uring_register_eventfd(&ring, event), "io_uring_register_eventfd");
	for (unsigned i = 0; i < REQUESTS; i++)
		io_uring_prep_read(io_uring_get_sqe(&ring), fd, memory, SIZE, 0);
	check(io_uring_submit(&ring), "io_uring_submit");

	while (done < REQUESTS && poll(&waiting, 1, PATIENCE_MS) == 1) {
		wakes++;
		eventfd_read(event, &value);
		do {
			check(io_uring_get_events(&ring), "io_uring_get_events");
			done += take(&ring);
		} while (flag && *ring.sq.kflags & IORING_SQ_TASKRUN);
	}
	printf("%s IORING_SETUP_TASKRUN_FLAG: %u of %u completions after %u wakeups\n",
	       flag ? "with   " : "without", done, REQUESTS, wakes);
	if (done < REQUESTS)
		printf("    the eventfd was silent for %d s; ", PATIENCE_MS / 1000);
	while (done + extra < REQUESTS) {
		check(io_uring_submit_and_wait(&ring, 1), "io_uring_enter");
		extra += take(&ring);
	}
	if (extra)
		printf("io_uring_enter(2) without it had the other %u\n", extra);
	io_uring_queue_exit(&ring);
	munmap(memory, SIZE);
	close(event);
	close(fd);
}

int main(int argc, char **argv)
{
	struct utsname name;

	if (argc != 2) {
		fprintf(stderr, "usage: %s DEVICE\n", argv[0]);
		return 2;
	}
	uname(&name);
	printf("Linux %s, %d reads of %d MiB from %s\n", name.release, REQUESTS, SIZE >> 20,
	       argv[1]);
	run(argv[1], 0);
	run(argv[1], IORING_SETUP_TASKRUN_FLAG);
	return 0;
}
