/* SPDX-License-Identifier: MIT */
/* What the C tests share. A program exits 0, 1, or 77 where it skipped something. */
#ifndef DMABUF_TEST_H
#define DMABUF_TEST_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../internal.h"
#include "testing.h"

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition))                                                                  \
			check_failed(__FILE__, __LINE__, #condition);                              \
	} while (0)

#define CHECK_EQUAL(a, b)                                                                          \
	do {                                                                                       \
		int64_t left_ = (int64_t)(a), right_ = (int64_t)(b);                               \
		if (left_ != right_) {                                                             \
			fprintf(stderr, "%lld and %lld: ", (long long)left_, (long long)right_);   \
			check_failed(__FILE__, __LINE__, #a " == " #b);                            \
		}                                                                                  \
	} while (0)

_Noreturn void check_failed(const char *file, int line, const char *what);
/* Say what is not tested here and how to have it tested; the program goes on. */
void skip(const char *reason);
/* The program's exit status. */
int finish(void);
/* What a failed check is printed with: where the deterministic loops are. */
void context(const char *what, unsigned round);

/* The same numbers in every run. */
uint64_t random_below(uint64_t limit);
void random_bytes(uint8_t *bytes, size_t size);
/* Lengths that are often a multiple of `align`, and often one off. */
uint64_t random_near(uint64_t limit, uint64_t align);

/* Run a test on a ring of each kind: io_uring shared and owned, threads, and in place. */
void on_each_ring(void (*test)(struct dmb_ring *ring));

enum { POISON = 0xa5, PAGE = 4096 };

/* Memory between two pages that nobody may touch. */
struct memory {
	uint8_t *bytes;
	uint64_t size; /* a multiple of the page */
};
void memory_map(struct memory *memory, uint64_t size);
void memory_unmap(struct memory *memory);

/* A temporary file, its O_DIRECT twin, and what it holds. */
struct file {
	int direct;
	int plain;
	uint8_t *bytes;
	uint64_t size;
	uint32_t memory_align;
	uint32_t offset_align;
};
/* Skip and return false if no file system supports O_DIRECT. */
bool file_open(struct file *file, uint64_t size);
void file_close(struct file *file);
/* Check that the file holds `bytes`. */
void file_check(const struct file *file);

struct dmb_job make_job(const struct file *file, const struct memory *memory, int direction,
			int route);

/* Random segments that overlap nowhere on the side that is written to. */
size_t random_segments(uint64_t *segments, size_t count, uint64_t file_size, uint64_t memory_size,
		       int direction);

/* The file offset of a position in all segments, or UINT64_MAX. */
uint64_t offset_of(const uint64_t *segments, size_t count, uint64_t position);
/* Whether the first `nbytes` positions, and only those where `only`, moved. */
void check_moved(const struct file *file, const struct memory *memory, const uint64_t *segments,
		 size_t count, int direction, uint64_t nbytes, bool only);

/* Create, run to the end, get the result, destroy. */
struct dmb_result transfer(struct dmb_ring *ring, const struct dmb_job *job,
			   const uint64_t *segments, size_t count);
/* Nothing completes on a ring that nobody uses, and its staging blocks are all there. */
void check_idle(struct dmb_ring *ring);

#endif
