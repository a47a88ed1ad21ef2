/* SPDX-License-Identifier: MIT */
/* The seams of testing.h: a backend around that of each ring, in ring->testing. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../internal.h"
#include "testing.h"

/* Like the kernel's node of a slot: a request in flight keeps it when the slot gets another. */
struct mapped {
	uint8_t *memory;
	size_t size;
	int target; /* the descriptor it was registered for, and its file */
	dev_t device;
	ino_t inode;
	unsigned users; /* the slot, and requests */
};

/*
 * A native request in flight. Its bytes go through a block: a dma-buf's mapping may have no pages
 * that O_DIRECT could pin.
 */
struct bounced {
	struct bounced *next;
	struct dmb_io *io;
	struct mapped *mapped;
	uint8_t *memory;  /* its place in the dma-buf */
	uint8_t *block;	  /* with the bytes */
	uint8_t *address; /* what the batch made of it */
	uint32_t length;
	int slot;
	int error; /* -errno that it is answered with, or 0 */
};

struct dmb_testing {
	struct dmb_backend_ops ops;
	const struct dmb_backend_ops *real;
	bool native;	  /* emulated */
	bool interrupted; /* nothing is complete until the next wait */
	struct bounced *bounced;
	pthread_mutex_t lock;
	struct mapped *slots[DMB_BUFFER_SLOTS + 1]; /* with DMB_PROBE_SLOT */
};

static struct {
	dmb_filter filter;
	void *filter_arg;
	dmb_registrar registrar;
	void *registrar_arg;
	unsigned native;
	int memory_fd;
	off_t memory_offset;
	int signal;
	unsigned first, count;
	atomic_uint waits;
} seams = {.memory_fd = -1};

void dmb_testing_set_filter(dmb_filter filter, void *arg)
{
	seams.filter = filter;
	seams.filter_arg = arg;
}

void dmb_testing_set_native(unsigned backends)
{
	seams.native = backends;
}

void dmb_testing_set_registrar(dmb_registrar registrar, void *arg)
{
	seams.registrar = registrar;
	seams.registrar_arg = arg;
}

void dmb_testing_set_memory(int fd, uint64_t offset)
{
	seams.memory_fd = fd;
	seams.memory_offset = (off_t)offset;
}

void dmb_testing_interrupt(unsigned first, unsigned count, int signal)
{
	seams.first = first;
	seams.count = count;
	seams.signal = signal;
	seams.waits = 0;
}

static void put(struct dmb_testing *backend, struct mapped *mapped)
{
	bool last;

	if (!mapped)
		return;
	pthread_mutex_lock(&backend->lock);
	last = !--mapped->users;
	pthread_mutex_unlock(&backend->lock);
	if (!last)
		return;
	munmap(mapped->memory, mapped->size);
	free(mapped);
}

static int map(int dmabuf_fd, int target_fd, struct mapped **ret)
{
	struct mapped *mapped;
	struct stat target;
	void *memory;
	off_t size;

	size = lseek(dmabuf_fd, 0, SEEK_END);
	if (size < 0 || fstat(target_fd, &target))
		return -errno;
	memory = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, dmabuf_fd, 0);
	if (memory == MAP_FAILED && errno == EACCES) /* the kernel does not look either */
		memory = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, dmabuf_fd, 0);
	if (memory == MAP_FAILED && errno == EINVAL && seams.memory_fd >= 0)
		memory = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED,
			      seams.memory_fd, seams.memory_offset);
	if (memory == MAP_FAILED)
		return -errno;
	mapped = malloc(sizeof(*mapped));
	if (!mapped) {
		munmap(memory, (size_t)size);
		return -ENOMEM;
	}
	*mapped = (struct mapped){memory, (size_t)size, target_fd, target.st_dev, target.st_ino, 1};
	*ret = mapped;
	return 0;
}

static int register_dmabuf(struct dmb_ring *ring, unsigned slot, int dmabuf_fd, int target_fd)
{
	struct dmb_testing *backend = ring->testing;
	struct mapped *mapped = NULL, *before;
	int rc = 0;

	if (!backend->native)
		return backend->real->register_dmabuf(ring, slot, dmabuf_fd, target_fd);
	if (dmabuf_fd >= 0 && seams.registrar)
		rc = seams.registrar(seams.registrar_arg, dmabuf_fd, target_fd);
	if (dmabuf_fd >= 0 && !rc)
		rc = map(dmabuf_fd, target_fd, &mapped);
	if (rc)
		return rc;
	pthread_mutex_lock(&backend->lock);
	before = backend->slots[slot];
	backend->slots[slot] = mapped;
	pthread_mutex_unlock(&backend->lock);
	put(backend, before);
	return 0;
}

/* Where a request's bytes are, or what the kernel would answer. */
static int find(struct dmb_testing *backend, const struct dmb_io *io, struct bounced *ret)
{
	uint64_t offset = (uintptr_t)io->address;
	struct mapped *mapped;
	struct stat target;

	pthread_mutex_lock(&backend->lock);
	mapped = backend->slots[io->buffer_slot];
	if (mapped)
		mapped->users++;
	pthread_mutex_unlock(&backend->lock);
	ret->mapped = mapped;
	if (!mapped || offset > mapped->size || io->length > mapped->size - offset)
		return -EFAULT;
	if (io->fd != mapped->target &&
	    (fstat(io->fd, &target) || target.st_dev != mapped->device ||
	     target.st_ino != mapped->inode))
		return -EBADF;
	ret->memory = mapped->memory + offset;
	return 0;
}

static void drop(struct dmb_testing *backend, struct bounced *bounced)
{
	put(backend, bounced->mapped);
	free(bounced->block);
	free(bounced);
}

/* A request without bytes takes the place of one that the kernel would refuse. */
static int issue(struct dmb_ring *ring, struct dmb_io *io)
{
	struct dmb_testing *backend = ring->testing;
	struct bounced *bounced;
	int rc;

	if (io->kind != DMB_MOVE || !io->native || !backend->native)
		return backend->real->issue(ring, io);
	bounced = calloc(1, sizeof(*bounced));
	if (!bounced)
		return -ENOMEM;
	bounced->io = io;
	bounced->address = io->address;
	bounced->length = io->length;
	bounced->slot = io->buffer_slot;
	bounced->error = find(backend, io, bounced);
	if (posix_memalign((void **)&bounced->block, 4096, io->length + 1U)) {
		drop(backend, bounced);
		return -ENOMEM;
	}
	if (bounced->error)
		io->length = 0;
	else if (io->direction == DMB_WRITE)
		memcpy(bounced->block, bounced->memory, io->length);
	io->address = bounced->block;
	io->buffer_slot = -1;
	rc = backend->real->issue(ring, io);
	if (rc) {
		io->address = bounced->address;
		io->length = bounced->length;
		io->buffer_slot = bounced->slot;
		drop(backend, bounced);
		return rc;
	}
	bounced->next = backend->bounced;
	backend->bounced = bounced;
	return 0;
}

static struct bounced *take_bounced(struct dmb_testing *backend, struct dmb_io *io)
{
	for (struct bounced **link = &backend->bounced; *link; link = &(*link)->next) {
		struct bounced *found = *link;

		if (found->io != io)
			continue;
		*link = found->next;
		io->address = found->address;
		io->length = found->length;
		io->buffer_slot = found->slot;
		if (found->error)
			io->result = found->error;
		return found;
	}
	return NULL;
}

static int32_t filtered(const struct dmb_io *io)
{
	struct dmb_completion completion = {
		.direction = io->direction,
		.straight = io->straight,
		.offset = io->offset,
		.size = io->length,
		.result = io->result,
	};

	return seams.filter ? seams.filter(seams.filter_arg, &completion) : io->result;
}

static struct dmb_io *reap(struct dmb_ring *ring)
{
	struct dmb_testing *backend = ring->testing;
	struct bounced *bounced;
	struct dmb_io *io;

	if (backend->interrupted) {
		backend->interrupted = false;
		return NULL;
	}
	io = backend->real->reap(ring);
	if (!io || io->kind != DMB_MOVE)
		return io;
	bounced = take_bounced(backend, io);
	io->result = filtered(io);
	if (!bounced)
		return io;
	if (io->direction == DMB_READ && io->result > 0)
		memcpy(bounced->memory, bounced->block, (size_t)io->result);
	drop(backend, bounced);
	return io;
}

static int wait_for(struct dmb_ring *ring, int timeout_ms)
{
	struct dmb_testing *backend = ring->testing;
	bool hit = atomic_fetch_add(&seams.waits, 1) - seams.first < seams.count;
	int rc = backend->real->wait(ring, hit ? 0 : timeout_ms);

	backend->interrupted = hit;
	if (hit) {
		ring->ready = 0;
		raise(seams.signal);
	}
	return rc;
}

static void destroy(struct dmb_ring *ring)
{
	struct dmb_testing *backend = ring->testing;

	backend->real->destroy(ring);
	for (unsigned slot = 0; slot < DMB_BUFFER_SLOTS; slot++)
		put(backend, backend->slots[slot]);
	pthread_mutex_destroy(&backend->lock);
	free(backend);
}

void dmb_testing_wrap(struct dmb_ring *ring)
{
	struct dmb_testing *backend = calloc(1, sizeof(*backend));

	if (!backend)
		return; /* only test_refused.c, which needs none of this, has no memory */
	backend->real = ring->ops;
	backend->ops = *ring->ops;
	backend->ops.destroy = destroy;
	backend->ops.issue = issue;
	backend->ops.reap = reap;
	backend->ops.wait = wait_for;
	pthread_mutex_init(&backend->lock, NULL);
	backend->ops.register_dmabuf = register_dmabuf;
	backend->native = seams.native & 1U << ring->info.backend;
	ring->testing = backend;
	ring->ops = &backend->ops;
}
