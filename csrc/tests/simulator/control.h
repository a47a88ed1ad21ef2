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
/* Return the number of lies since the last call. */
uint32_t virtual_lies(void);
/* Print everything that happens, or stop that. */
void virtual_loud(int loud);
/* Return a hash of everything that happened since the beginning. */
uint64_t virtual_history(void);

#endif
