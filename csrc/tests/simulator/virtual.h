/* SPDX-License-Identifier: MIT */
/*
 * A virtual kernel for tests: io_uring rings, one file with its page cache, a clock, and the system
 * calls that the core makes. The core runs on it unchanged. The linker gives the core these calls
 * in the place of libc's (--wrap), and virtual io_uring functions in the place of liburing's.
 *
 * One seed decides everything: when a request starts, when each piece of it moves, how it ends, and
 * what other programs do to the page cache meanwhile. One thread uses the kernel.
 */
#ifndef DMABUF_VIRTUAL_H
#define DMABUF_VIRTUAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "control.h"

enum {
	VIRTUAL_PAGE = 4096,
	FILE_PAGES = 24,
	FILE_MOST = FILE_PAGES * VIRTUAL_PAGE,
	DIRECT_FD = 100000, /* the virtual file with O_DIRECT, without it, and its dma-bufs */
	PLAIN_FD,
	EVENT_FD,
	SLAB_FD, /* and the numbers after it */
	SLABS = 8,
};

/* -- decisions */

/*
 * Return a number below `limit`. 0 is always the least harmful choice. Every decision is recorded,
 * so that a failure can be replayed with some of them replaced by 0.
 */
uint64_t choose(uint64_t limit);
bool chance(unsigned per_mille);
void choices_from_seed(uint64_t seed);
void choices_replay(const uint32_t *choices, size_t count);
/* The same, of two bytes each. */
void choices_from_bytes(const uint8_t *data, size_t size);
const uint32_t *choices_made(size_t *count);

/* -- what happened */

/* Add to the hash of everything that happened; print it where `loud`. */
void happened(const char *what, uint64_t a, uint64_t b, uint64_t c);
uint64_t history(void);
/* What ends the process after a violated promise was reported. */
extern void (*on_broken)(const char *format);
/* Report a violated promise, and end the process. */
_Noreturn void broken(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* -- the world */

enum page_state { ABSENT, CLEAN, DIRTY };

struct virtual_file {
	uint64_t size;
	uint32_t block; /* the alignment of O_DIRECT */
	uint32_t memory_align;
	bool device;	  /* a block device: no invalidation after an asynchronous O_DIRECT write */
	bool passthrough; /* an NVMe character device */
	uint32_t folio;	  /* pages that the cache takes and drops together */
	uint8_t medium[FILE_MOST];
	uint8_t cache[FILE_MOST];
	enum page_state pages[FILE_PAGES];
	uint64_t busy_until[FILE_PAGES]; /* somebody else holds the page */
	bool bad[FILE_MOST / 512];
};

struct world {
	struct virtual_file file;
	uint8_t *slabs[SLABS]; /* the memory of each dma-buf, and its size */
	uint64_t slab_sizes[SLABS];
	struct faults faults;
	bool failing;	     /* calls may fail now */
	bool others;	     /* other programs use the file */
	uint64_t truncated;  /* another program cuts the file to this size; UINT64_MAX: never */
	bool errors[256];    /* errors that were answered */
	uint64_t signals;    /* of the eventfd */
	uint64_t waits;	     /* since the episode began */
	int64_t allocations; /* that were not freed */
	uint64_t resets;     /* of the controller */
	uint64_t lies;
	bool loud;
};
extern struct world world;

void world_reset(void);
uint64_t now_ns(void);
/* Let time pass, and everything that is due happen. */
void time_passes(uint64_t ns);
/* Do what happens next; false if nothing will. */
bool next_event(void);
/* Count the requests in flight whose user_data lies in [from, to). */
unsigned in_flight_between(const void *from, const void *to);
unsigned in_flight(void);

/* The file as a program reads it, and as the medium holds it after everything was written. */
void file_view(uint8_t *ret);
void file_write_out(void);

/* -- requests: for rings.c */

struct request {
	bool used;
	struct virtual_ring *ring;
	uint64_t user_data;
	uint64_t number;
	bool pause, flush, write, direct;
	int fd;
	struct slot *slot; /* a reference, or NULL */
	uint8_t *memory;
	uint64_t offset, length;
	/* its course */
	uint64_t moved;
	uint64_t limit;	  /* bytes after which it ends */
	int error;	  /* -errno of its end, or 0: the bytes moved */
	int status;	  /* of an NVMe command */
	bool passthrough; /* an NVMe command */
	bool cancelled;
	uint64_t at; /* when its next piece moves */
	bool ending;
	enum lie lie;
};

struct request *request_new(void);
/* Decide the course of a request. */
void request_start(struct request *request);
/* rings.c: post a completion. */
void request_done(struct request *request, int64_t result);

/* Registered memory: a request in flight keeps what its slot held when it started. */
struct slot {
	unsigned users;
	uint8_t *memory; /* of pinned memory its address, of a dma-buf its first byte */
	uint64_t size;
	int target;	 /* of a dma-buf, the file that it is registered for; else -1 */
	bool mapped;	 /* munmap(2) it at the end */
	uint64_t resets; /* those before it was registered: a later one revokes it */
};
void slot_put(struct slot *slot);

/* Synchronous calls share the requests' code. */
int64_t transfer_now(bool write, int fd, uint8_t *memory, uint64_t length, uint64_t offset);
/* Whether a descriptor is the virtual file. */
bool is_virtual(int fd);
bool same_file(int fd, int other);

#endif
