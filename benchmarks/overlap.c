/* SPDX-License-Identifier: MIT */
/*
 * What two processors can do with a file whose device is memory: blocks of 256 KiB read with
 * O_DIRECT and copied, without io_uring. Why the staged route does zram as it does.
 *
 *     cc -O2 -pthread -o overlap benchmarks/overlap.c && ./overlap FILE ROUNDS
 *
 * Each way moves the first GiB of FILE, all by turns, ROUNDS times. A line has the median of the
 * seconds, bytes a second, and the median of the process's CPU seconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define SIZE (1UL << 30)
#define BLOCK (256UL << 10)
#define BLOCKS 8
#define MOST 99

static int file;
static uint8_t *target, *staging;
static sem_t full, empty;

static void fail(const char *what, int number)
{
	fprintf(stderr, "overlap: %s: %s\n", what, strerror(number));
	exit(1);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static double cpu(void)
{
	struct rusage used;

	getrusage(RUSAGE_SELF, &used);
	return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
	       (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void read_block(uint8_t *block, size_t at)
{
	ssize_t got = pread(file, block, BLOCK, (off_t)at);

	if (got != (ssize_t)BLOCK)
		fail("pread", got < 0 ? errno : ENODATA);
}

static void copy_block(size_t at, const uint8_t *block)
{
	memcpy(target + at, block, BLOCK);
}

static void read_only(void)
{
	for (size_t at = 0; at < SIZE; at += BLOCK)
		read_block(staging, at);
}

static void copy_only(void)
{
	for (size_t at = 0; at < SIZE; at += BLOCK)
		copy_block(at, staging);
}

static void read_then_copy(void)
{
	for (size_t at = 0; at < SIZE; at += BLOCK) {
		read_block(staging, at);
		copy_block(at, staging);
	}
}

static void direct(void)
{
	for (size_t at = 0; at < SIZE; at += BLOCK)
		read_block(target + at, at);
}

static uint8_t *block_of(size_t number)
{
	return staging + number % BLOCKS * BLOCK;
}

static void *reader(void *arg)
{
	for (size_t number = 0; number < SIZE / BLOCK; number++) {
		sem_wait(&empty);
		read_block(block_of(number), number * BLOCK);
		sem_post(&full);
	}
	return arg;
}

/* Every other block, the odd ones for `odd`. */
static void *half_staged(void *odd)
{
	for (size_t number = odd != NULL; number < SIZE / BLOCK; number += 2) {
		read_block(block_of(odd != NULL), number * BLOCK);
		copy_block(number * BLOCK, block_of(odd != NULL));
	}
	return NULL;
}

static void *half_direct(void *odd)
{
	for (size_t number = odd != NULL; number < SIZE / BLOCK; number += 2)
		read_block(target + number * BLOCK, number * BLOCK);
	return NULL;
}

static pthread_t start(void *(*part)(void *))
{
	pthread_t thread;
	int rc = pthread_create(&thread, NULL, part, &file);

	if (rc)
		fail("pthread_create", rc);
	return thread;
}

static void one_reads_one_copies(void)
{
	pthread_t thread;

	sem_init(&full, 0, 0);
	sem_init(&empty, 0, BLOCKS);
	thread = start(reader);
	for (size_t number = 0; number < SIZE / BLOCK; number++) {
		sem_wait(&full);
		copy_block(number * BLOCK, block_of(number));
		sem_post(&empty);
	}
	pthread_join(thread, NULL);
}

static void both_read_and_copy(void)
{
	pthread_t thread = start(half_staged);

	half_staged(NULL);
	pthread_join(thread, NULL);
}

static void both_direct(void)
{
	pthread_t thread = start(half_direct);

	half_direct(NULL);
	pthread_join(thread, NULL);
}

static const struct {
	const char *name;
	void (*move)(void);
} ways[] = {
	{"read only", read_only},
	{"copy only", copy_only},
	{"read, then copy", read_then_copy},
	{"one thread reads, another copies", one_reads_one_copies},
	{"two threads that each do both", both_read_and_copy},
	{"read into place", direct},
	{"two threads that read into place", both_direct},
};

#define WAYS (sizeof(ways) / sizeof(*ways))

static void *memory(int fd, size_t size)
{
	void *made = mmap(NULL, size, PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_POPULATE | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);

	if (made == MAP_FAILED)
		fail("mmap", errno);
	return made;
}

static int ascending(const void *a, const void *b)
{
	double first = *(const double *)a, second = *(const double *)b;

	return (first > second) - (first < second);
}

static double median(double *numbers, size_t count)
{
	qsort(numbers, count, sizeof(*numbers), ascending);
	return numbers[count / 2];
}

int main(int argc, char **argv)
{
	static double taken[WAYS][MOST], used[WAYS][MOST];
	size_t rounds = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
	int fd;

	if (!rounds || rounds > MOST) {
		fprintf(stderr, "overlap FILE ROUNDS, at most %d\n", MOST);
		return 2;
	}
	file = open(argv[1], O_RDONLY | O_DIRECT);
	if (file < 0)
		fail(argv[1], errno);
	fd = memfd_create("overlap", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, (off_t)SIZE))
		fail("memfd", errno);
	target = memory(fd, SIZE);
	staging = memory(-1, BLOCKS * BLOCK);
	for (size_t round = 0; round < rounds; round++) {
		for (size_t i = 0; i < WAYS; i++) {
			double begun = now(), before = cpu();

			ways[i].move();
			taken[i][round] = now() - begun;
			used[i][round] = cpu() - before;
		}
	}
	for (size_t i = 0; i < WAYS; i++) {
		double seconds = median(taken[i], rounds);

		printf("%-34s%.3f s  %.2f GB/s  CPU %.3f s/GiB\n", ways[i].name, seconds,
		       (double)SIZE / seconds / 1e9, median(used[i], rounds));
	}
	return 0;
}
