/* SPDX-License-Identifier: MIT */
/* fuse.c and fuse_mount.c: a file over memory, served by a process of its own. */
#include "test.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SLAB = 3 * PAGE, SLABS = 3, SIZE = SLAB * SLABS, LARGE = (5 << 20) + PAGE };

struct served {
	int fd;
	uint8_t *memory;
	uint64_t size;
	pid_t server;
};

static void on_alarm(int number)
{
	(void)number;
}

/* A file over `count` slabs of shared memory; false where FUSE is not to be had. */
static bool serve(struct served *served, uint64_t slab, size_t count, int flags, int fence)
{
	struct dmb_fuse_slab slabs[SLABS];
	int device, root, step, rc;
	char path[32];

	served->size = slab * count;
	served->memory =
		mmap(NULL, served->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(served->memory != MAP_FAILED);
	random_bytes(served->memory, served->size);
	for (size_t i = 0; i < count; i++)
		slabs[i] = (struct dmb_fuse_slab){served->memory + i * slab, slab, fence};
	rc = dmb_fuse_mount(&device, &root, &step);
	if (rc) {
		munmap(served->memory, served->size);
		fprintf(stderr, "step %d: %s\n", step, strerror(-rc));
		skip("no FUSE for this user (be root, or make /dev/fuse and user namespaces "
		     "available)");
		return false;
	}
	served->server = fork();
	if (!served->server) {
		close(root);
		rc = dmb_fuse_serve(device, slabs, count, flags != O_RDONLY);
		_exit(rc ? 1 : 0);
	}
	close(device);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", root);
	served->fd = open(path, flags | O_CLOEXEC);
	CHECK(served->fd >= 0);
	CHECK_EQUAL(lseek(served->fd, 0, SEEK_END), served->size);
	CHECK_EQUAL(lseek(served->fd, 0, SEEK_SET), 0);
	close(root);
	return true;
}

/* The server ends with the last descriptor. */
static void end(struct served *served)
{
	int status = -1;

	close(served->fd);
	CHECK_EQUAL(waitpid(served->server, &status, 0), served->server);
	CHECK_EQUAL(status, 0);
	munmap(served->memory, served->size);
}

static void reads(void)
{
	static uint8_t bytes[SIZE + PAGE];
	struct served served;

	if (!serve(&served, SLAB, SLABS, O_RDWR, -1))
		return;
	for (unsigned round = 0; round < 300; round++) {
		const uint64_t offset = random_near(SIZE + PAGE, PAGE);
		const uint64_t size = random_near(SIZE, PAGE);
		const uint64_t there = offset < SIZE ? SIZE - offset : 0;
		const uint64_t wanted = size < there ? size : there;

		context("reads", round);
		memset(bytes, POISON, sizeof(bytes));
		CHECK_EQUAL(pread(served.fd, bytes, size, (off_t)offset), wanted);
		CHECK(!wanted || !memcmp(bytes, served.memory + offset, wanted));
		for (uint64_t i = wanted; i < sizeof(bytes); i++)
			CHECK(bytes[i] == POISON);
	}
	end(&served);
}

static void writes(void)
{
	static uint8_t bytes[SIZE], expected[SIZE];
	struct served served;

	if (!serve(&served, SLAB, SLABS, O_RDWR, -1))
		return;
	for (unsigned round = 0; round < 300; round++) {
		const uint64_t offset = random_near(SIZE + PAGE, PAGE);
		const uint64_t size = random_near(SIZE, PAGE);
		const uint64_t there = offset < SIZE ? SIZE - offset : 0;
		const uint64_t fits = size < there ? size : there;
		const ssize_t rc =
			(errno = 0, random_bytes(bytes, size), memset(served.memory, POISON, SIZE),
			 pwrite(served.fd, bytes, size, (off_t)offset));

		context("writes", round);
		memset(expected, POISON, SIZE);
		memcpy(expected + (fits ? offset : 0), bytes, fits);
		CHECK(!memcmp(served.memory, expected, SIZE));
		CHECK_EQUAL(rc, size && !fits ? -1 : (int64_t)fits);
		CHECK_EQUAL(rc < 0 ? errno : 0, size && !fits ? ENOSPC : 0);
	}
	end(&served);
}

/* More than one request takes: each way by itself. */
static void large(void)
{
	struct served served;
	uint8_t *bytes = malloc(LARGE);

	context("large", 0);
	if (serve(&served, LARGE, 1, O_RDWR, -1)) {
		memset(bytes, POISON, LARGE);
		CHECK_EQUAL(read(served.fd, bytes, LARGE), LARGE);
		CHECK(!memcmp(bytes, served.memory, LARGE));
		CHECK_EQUAL(lseek(served.fd, 0, SEEK_CUR), LARGE);
		random_bytes(bytes, LARGE);
		CHECK_EQUAL(pwrite(served.fd, bytes, LARGE, 0), LARGE);
		CHECK(!memcmp(bytes, served.memory, LARGE));
		end(&served);
	}
	free(bytes);
}

static void as_a_file(void)
{
	struct served served;
	struct stat stat;
	char path[32];
	int again;

	context("as a file", 0);
	if (!serve(&served, SLAB, SLABS, O_RDWR, -1))
		return;
	CHECK_EQUAL(fstat(served.fd, &stat), 0);
	CHECK_EQUAL(stat.st_size, SIZE);
	CHECK_EQUAL(stat.st_mode, S_IFREG | 0600);
	CHECK_EQUAL(stat.st_uid, geteuid());
	CHECK_EQUAL(lseek(served.fd, -1, SEEK_END), SIZE - 1);
	CHECK_EQUAL(lseek(served.fd, 5, SEEK_SET), 5);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", served.fd);
	again = open(path, O_RDWR | O_TRUNC); /* changes nothing */
	CHECK_EQUAL(fstat(again, &stat), 0);
	CHECK_EQUAL(stat.st_size, SIZE);
	CHECK_EQUAL(lseek(again, 0, SEEK_CUR), 0);
	CHECK_EQUAL(ftruncate(again, SIZE), 0);
	CHECK_EQUAL(ftruncate(again, 0) ? errno : 0, EINVAL);
	CHECK_EQUAL(ftruncate(again, SIZE + 1) ? errno : 0, EINVAL);
	CHECK_EQUAL(truncate(path, 1) ? errno : 0, EINVAL);
	CHECK_EQUAL(fchmod(again, 0666) ? errno : 0, EPERM);
	CHECK_EQUAL(futimens(again, NULL), 0);
	CHECK_EQUAL(fsync(again), 0);
	close(again);
	CHECK_EQUAL(lseek(served.fd, 0, SEEK_CUR), 5);
	end(&served);
}

static void holes(void)
{
	static uint8_t expected[SIZE];
	struct served served;

	context("holes", 0);
	if (!serve(&served, SLAB, SLABS, O_RDWR, -1))
		return;
	memcpy(expected, served.memory, SIZE);
	CHECK_EQUAL(fallocate(served.fd, 0, 0, SIZE), 0);
	CHECK_EQUAL(fallocate(served.fd, 0, 1, SIZE) ? errno : 0, ENOSPC);
	CHECK(!memcmp(served.memory, expected, SIZE));
	CHECK_EQUAL(fallocate(served.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, SLAB - 7, 21),
		    0);
	memset(expected + SLAB - 7, 0, 21);
	CHECK(!memcmp(served.memory, expected, SIZE));
	CHECK_EQUAL(fallocate(served.fd, FALLOC_FL_ZERO_RANGE, 2 * SLAB, SLAB), 0);
	memset(expected + 2 * SLAB, 0, SLAB);
	CHECK(!memcmp(served.memory, expected, SIZE));
	end(&served);
}

static void read_only(void)
{
	struct served served;
	char path[32], byte;

	context("read-only", 0);
	if (!serve(&served, SLAB, 1, O_RDONLY, -1))
		return;
	CHECK_EQUAL(read(served.fd, &byte, 1), 1);
	CHECK_EQUAL(write(served.fd, &byte, 1) < 0 ? errno : 0, EBADF);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", served.fd);
	CHECK_EQUAL(open(path, O_RDWR) < 0 ? errno : 0, EACCES);
	CHECK_EQUAL(open(path, O_WRONLY) < 0 ? errno : 0, EACCES);
	end(&served);
}

/* Shared with the file, page by page: fetched when first touched, written at msync or munmap. */
static void mapped(void)
{
	struct served served;
	uint8_t *map;

	context("mapped", 0);
	if (!serve(&served, SLAB, SLABS, O_RDWR, -1))
		return;
	map = mmap(NULL, SIZE, PROT_READ, MAP_PRIVATE, served.fd, 0);
	CHECK(map != MAP_FAILED && !memcmp(map, served.memory, SIZE));
	munmap(map, SIZE);
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, served.fd, 0);
	if (map == MAP_FAILED) {
		CHECK_EQUAL(errno, ENODEV);
		skip("no shared mapping of a FUSE file: Linux 6.6 has it");
	} else {
		CHECK(!memcmp(map, served.memory, SIZE));
		random_bytes(map, SIZE);
		CHECK_EQUAL(msync(map, SIZE, MS_SYNC), 0);
		CHECK(!memcmp(map, served.memory, SIZE));
		map[SIZE - 1] ^= 1;
		const uint8_t last = map[SIZE - 1];

		CHECK_EQUAL(munmap(map, SIZE), 0);
		CHECK_EQUAL(served.memory[SIZE - 1], last);
	}
	end(&served);
}

/* The server's death is an error in every call, and nobody waits for ever. */
static void without_server(void)
{
	struct served served;
	int status;
	char byte;

	context("without server", 0);
	if (!serve(&served, SLAB, 1, O_RDWR, -1))
		return;
	kill(served.server, SIGKILL);
	waitpid(served.server, &status, 0);
	CHECK_EQUAL(read(served.fd, &byte, 1) < 0 ? errno : 0, ENOTCONN);
	CHECK_EQUAL(write(served.fd, &byte, 1) < 0 ? errno : 0, ENOTCONN);
	close(served.fd);
	munmap(served.memory, served.size);
}

struct reader {
	int fd;
	int result;
};

static void *read_byte(void *arg)
{
	struct reader *reader = arg;
	char byte;

	reader->result = read(reader->fd, &byte, 1) < 0 ? errno : 0;
	return NULL;
}

/*
 * A pipe in a dma-buf's place: not readable, as one whose fence has not signalled. Then a signal
 * ends a read, other requests are answered meanwhile, and a fence lets the read go on, to an ioctl
 * that a pipe does not know.
 */
static void fences(void)
{
	struct sigaction action = {.sa_handler = on_alarm}; /* no SA_RESTART */
	struct itimerval soon = {.it_value.tv_usec = 20000};
	struct reader reader;
	struct served served;
	struct stat stat;
	pthread_t thread;
	int pipes[2];
	char byte;

	context("fences", 0);
	CHECK_EQUAL(pipe(pipes), 0);
	if (!serve(&served, SLAB, 1, O_RDWR, pipes[0]))
		return;
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &soon, NULL);
	CHECK_EQUAL(read(served.fd, &byte, 1) < 0 ? errno : 0, EINTR);
	setitimer(ITIMER_REAL, &soon, NULL);
	CHECK_EQUAL(write(served.fd, &byte, 1) < 0 ? errno : 0, EINTR);
	reader.fd = served.fd;
	CHECK_EQUAL(pthread_create(&thread, NULL, read_byte, &reader), 0);
	CHECK_EQUAL(fstat(served.fd, &stat), 0);
	CHECK_EQUAL(write(pipes[1], "x", 1), 1);
	pthread_join(thread, NULL);
	CHECK_EQUAL(reader.result, ENOTTY);
	close(pipes[0]);
	close(pipes[1]);
	end(&served);
}

int main(void)
{
	alarm(60); /* a hang is a failure */
	reads();
	writes();
	large();
	as_a_file();
	holes();
	read_only();
	mapped();
	without_server();
	alarm(0);
	fences();
	return finish();
}
