/* SPDX-License-Identifier: MIT */
/*
 * What tests of the core and of the package may do to it, where it is built with DMB_TESTING: see
 * and change completions, emulate the native route, and interrupt waits. All of it holds for every
 * ring of the process, and is set while no transfer runs.
 */
#ifndef DMABUF_TESTING_H
#define DMABUF_TESTING_H

#include "../core.h"

/* A completed request that moved bytes. */
struct dmb_completion {
	int32_t direction;
	int32_t straight; /* between file and buffer, without a staging block */
	uint64_t offset;  /* in the file */
	uint32_t size;
	int32_t result;
};

/*
 * Set a function that receives every completion before the batch and returns the result to use. The
 * thread that uses the ring calls it; NULL for none.
 */
typedef int32_t (*dmb_filter)(void *arg, const struct dmb_completion *completion);
void dmb_testing_set_filter(dmb_filter filter, void *arg);

/*
 * Emulate the native route on rings that are created from now on, of the backends in the mask
 * (1 << DMB_BACKEND_...): map the dma-bufs, and return the results of a kernel with the series.
 */
void dmb_testing_set_native(unsigned backends);

/* Set a function that returns 0 or -errno for each registration of a dma-buf; NULL for none. */
typedef int32_t (*dmb_registrar)(void *arg, int32_t dmabuf_fd, int32_t target_fd);
void dmb_testing_set_registrar(dmb_registrar registrar, void *arg);

/*
 * Have the emulation map `fd` from `offset` on in the place of a dma-buf that cannot be mapped; -1
 * for none.
 */
void dmb_testing_set_memory(int fd, uint64_t offset);

/*
 * Send a signal to the waiting thread in each of `count` waits for completions, after `first`
 * others from now on. Such a wait ends without a completion.
 */
void dmb_testing_interrupt(unsigned first, unsigned count, int signal);

#endif
