/* SPDX-License-Identifier: MIT */
/* The faults of the virtual kernel, for the C driver and for Python (cffi parses this file). */
#ifndef DMABUF_CONTROL_H
#define DMABUF_CONTROL_H

#include <stdint.h>

/* How a device lies: the request completes in full, and the bytes did not arrive so. */
enum lie {
	HONEST,
	DROPPED,     /* nothing moved */
	PARTIAL,     /* only the first part moved */
	MISDIRECTED, /* the bytes moved somewhere else */
	TORN,	     /* some blocks moved, and others did not */
	CORRUPTED,   /* one bit is wrong */
};

/* Chances in a thousand, of each request or call. */
struct faults {
	uint32_t short_count; /* a part moves */
	uint32_t again;	      /* EAGAIN or EINTR, whether bytes moved or not */
	uint32_t error;	      /* another errno */
	uint32_t lost;	      /* no completion for 35 seconds */
	uint32_t interrupt;   /* a wait ends with EINTR */
	uint32_t submit;      /* a submission takes only some requests, or fails */
	uint32_t memory;      /* an allocation fails */
	uint32_t reset;	      /* the controller is reset: every registered dma-buf is revoked */
	uint32_t lie;
	uint32_t latency; /* the longest time of a piece, in microseconds */
};

/* -- for Python: one seed for everything until the next call */
void virtual_begin(uint64_t seed, const struct faults *faults);
/* Return the number of requests in flight whose memory lies in a range; of all for size 0. */
uint32_t virtual_in_flight(uint64_t address, uint64_t size);
/* Return the number of controller resets. */
uint32_t virtual_resets(void);
/* Return the number of lies since the last call. */
uint32_t virtual_lies(void);
/* Print everything that happens, or stop that. */
void virtual_loud(int loud);
/* Return a hash of everything that happened since the beginning. */
uint64_t virtual_history(void);

/*
 * From now on another program uses the real file of a descriptor: with a chance in a thousand, at
 * each event, it appends bytes APPENDED, once, or cuts the file and later makes it as long again.
 * Before the next call the file has its length again. -1 for none.
 */
void virtual_share(int fd, uint32_t append, uint32_t cut);
/* Return how many bytes it appended, and where. */
uint64_t virtual_appended(uint64_t *at);
/*
 * From now on report writes to real files by descriptors without O_DSYNC, and waits until the
 * kernel lets go of a dma-buf, which take about 18 ms.
 */
void virtual_forbid(int unsynced, int waits);
/* Return one of these since the last call, or NULL. */
const char *virtual_violation(void);

enum { APPENDED = 0x5a };

#endif
