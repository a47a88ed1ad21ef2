/* SPDX-License-Identifier: MIT */
/* What the virtual rings and the virtual system calls need of each other and of the kernel. */
#ifndef DMABUF_RINGS_H
#define DMABUF_RINGS_H

#include "virtual.h"

/* io_uring_register(2), as far as the core calls it without liburing. */
long ring_register(int fd, unsigned opcode, void *argument);
/* Cancel a request that has not begun; return 0 or -errno. */
int request_cancel(uint64_t user_data);
/* Whether a descriptor goes past the page cache. */
bool is_direct(int fd);
/* An NVMe command and sync_file_range(2), synchronously: a count, a status, or -errno. */
int64_t command_now(bool write, uint8_t *memory, uint64_t length, uint64_t offset);
int flush_now(uint64_t offset, uint64_t size);
/* Drop clean pages as posix_fadvise(2) does; count the pages of a range in the cache. */
void pages_drop(uint64_t start, uint64_t end);
unsigned pages_count(uint64_t start, uint64_t end);
/* The completion of a synchronous request. */
void synchronous_done(int64_t result);
/* Do what happens next, if that is before the deadline; else let the time pass until then. */
bool event_until(uint64_t deadline);
/* python.c: what another program does, and whether a request or a wait is permitted. */
void others_in_real_file(void);
void check_sync(const struct request *request);
void check_wait(void);

#endif
