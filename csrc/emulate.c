/* SPDX-License-Identifier: MIT */
/* The native route without a kernel that has it: a table of mapped dma-bufs, for tests. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

/* Like the kernel's node of a slot: a request in flight keeps it when the slot gets another. */
struct mapped {
	uint8_t *memory;
	size_t size;
	dev_t device; /* of the target */
	ino_t inode;
	unsigned users; /* the slot, and requests */
};

struct dmb_emulated {
	pthread_mutex_t lock;
	struct mapped *slots[DMB_BUFFER_SLOTS];
};

int dmb_emulate_create(struct dmb_emulated **ret)
{
	*ret = calloc(1, sizeof(**ret));
	if (*ret)
		pthread_mutex_init(&(*ret)->lock, NULL);
	return *ret ? 0 : -ENOMEM;
}

static void put(struct dmb_emulated *emulated, struct mapped *mapped)
{
	bool last;

	if (!mapped)
		return;
	pthread_mutex_lock(&emulated->lock);
	last = !--mapped->users;
	pthread_mutex_unlock(&emulated->lock);
	if (!last)
		return;
	munmap(mapped->memory, mapped->size);
	free(mapped);
}

void dmb_emulate_destroy(struct dmb_emulated *emulated)
{
	if (!emulated)
		return;
	for (unsigned slot = 0; slot < DMB_BUFFER_SLOTS; slot++)
		put(emulated, emulated->slots[slot]);
	pthread_mutex_destroy(&emulated->lock);
	free(emulated);
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
	if (memory == MAP_FAILED)
		return -errno;
	mapped = malloc(sizeof(*mapped));
	if (!mapped) {
		munmap(memory, (size_t)size);
		return -ENOMEM;
	}
	*mapped = (struct mapped){memory, (size_t)size, target.st_dev, target.st_ino, 1};
	*ret = mapped;
	return 0;
}

int dmb_emulate_register(struct dmb_emulated *emulated, unsigned slot, int dmabuf_fd, int target_fd)
{
	struct mapped *mapped = NULL, *before;
	int rc;

	if (!emulated)
		return -EOPNOTSUPP;
	rc = dmabuf_fd < 0 ? 0 : map(dmabuf_fd, target_fd, &mapped);
	if (rc)
		return rc;
	pthread_mutex_lock(&emulated->lock);
	before = emulated->slots[slot];
	emulated->slots[slot] = mapped;
	pthread_mutex_unlock(&emulated->lock);
	put(emulated, before);
	return 0;
}

/* Where a request's bytes are; *ret, or NULL, is to be put. */
static int32_t take(struct dmb_emulated *emulated, const struct dmb_io *io, uint8_t **address,
		    struct mapped **ret)
{
	uint64_t offset = (uintptr_t)io->address;
	struct mapped *mapped;
	struct stat target;

	if (!emulated || io->buffer_slot < 0)
		return -EFAULT;
	if (fstat(io->fd, &target))
		return -errno;
	pthread_mutex_lock(&emulated->lock);
	mapped = emulated->slots[io->buffer_slot];
	if (mapped)
		mapped->users++;
	pthread_mutex_unlock(&emulated->lock);
	*ret = mapped;
	if (!mapped || offset > mapped->size || io->length > mapped->size - offset)
		return -EFAULT;
	if (target.st_dev != mapped->device || target.st_ino != mapped->inode)
		return -EBADF;
	*address = mapped->memory + offset;
	return 0;
}

/* Through a block of our own: a dma-buf's mapping may have no pages that O_DIRECT could pin. */
int32_t dmb_emulate_execute(struct dmb_emulated *emulated, const struct dmb_io *io)
{
	struct mapped *mapped = NULL;
	uint8_t *memory = NULL;
	void *block = NULL;
	int32_t rc = take(emulated, io, &memory, &mapped);

	if (!rc && posix_memalign(&block, 4096, io->length + 1U))
		rc = -ENOMEM;
	if (!rc) {
		if (io->direction == DMB_WRITE)
			memcpy(block, memory, io->length);
		rc = (int32_t)dmb_lone(io->direction, io->fd, (uint64_t)(uintptr_t)block,
				       io->length, io->offset);
		if (io->direction == DMB_READ && rc > 0)
			memcpy(memory, block, (size_t)rc);
		free(block);
	}
	put(emulated, mapped);
	return rc;
}
