/* SPDX-License-Identifier: MIT */
/*
 * ThreadSanitizer cannot observe accesses by the kernel. So a thread that stands for the kernel
 * accesses each request's memory between its start and its completion. It synchronizes only with
 * the threads that issue and reap the request, so an access by another thread is reported as a
 * race.
 */
#ifndef DMABUF_WATCH_H
#define DMABUF_WATCH_H

#include "test.h"

#ifdef __SANITIZE_THREAD__
#include <pthread.h>

void *__tsan_create_fiber(unsigned flags);
void *__tsan_get_current_fiber(void);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
void __tsan_read_range(void *address, long size);
void __tsan_write_range(void *address, long size);

enum { NO_SYNC = 1 };

static struct dmb_backend_ops uring, watched;

static int watched_issue(struct dmb_ring *ring, struct dmb_io *io)
{
	__tsan_release(io);
	return uring.issue(ring, io);
}

static struct dmb_io *watched_reap(struct dmb_ring *ring)
{
	static _Thread_local void *kernel; /* it knows only what the requests tell it */
	struct dmb_io *io = uring.reap(ring);
	void *me = __tsan_get_current_fiber(), *address;
	bool read;
	long size;

	if (!io || io->kind != DMB_MOVE || io->result <= 0)
		return io;
	if (!kernel)
		kernel = __tsan_create_fiber(0);
	address = io->address;
	read = io->direction == DMB_READ;
	size = io->result;
	__tsan_switch_to_fiber(kernel, NO_SYNC);
	__tsan_acquire(io);
	(read ? __tsan_write_range : __tsan_read_range)(address, size);
	__tsan_release(io);
	__tsan_switch_to_fiber(me, NO_SYNC);
	__tsan_acquire(io);
	return io;
}

static void watch(struct dmb_ring *ring)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

	if (ring->info.backend != DMB_BACKEND_URING)
		return;
	pthread_mutex_lock(&lock);
	if (!watched.issue) {
		uring = watched = *ring->ops;
		watched.issue = watched_issue;
		watched.reap = watched_reap;
	}
	pthread_mutex_unlock(&lock);
	ring->ops = &watched;
}
#else
static void watch(struct dmb_ring *ring)
{
	(void)ring;
}
#endif

#endif
