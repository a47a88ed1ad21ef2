/* SPDX-License-Identifier: MIT */
/* The native route without a kernel that has it: a table of mapped dma-bufs, for tests. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

struct mapped {
	uint8_t *memory;
	size_t size;
	dev_t device; /* of the target */
	ino_t inode;
};

struct dmb_emulated {
	struct mapped slots[DMB_BUFFER_SLOTS];
};

int dmb_emulate_create(struct dmb_emulated **ret)
{
	*ret = calloc(1, sizeof(**ret));
	return *ret ? 0 : -ENOMEM;
}

static void clear(struct mapped *mapped)
{
	if (mapped->memory)
		munmap(mapped->memory, mapped->size);
	*mapped = (struct mapped){0};
}

void dmb_emulate_destroy(struct dmb_emulated *emulated)
{
	for (unsigned slot = 0; emulated && slot < DMB_BUFFER_SLOTS; slot++)
		clear(&emulated->slots[slot]);
	free(emulated);
}

int dmb_emulate_register(struct dmb_emulated *emulated, unsigned slot, int dmabuf_fd, int target_fd)
{
	struct mapped *mapped;
	struct stat target;
	off_t size;

	if (!emulated)
		return -EOPNOTSUPP;
	mapped = &emulated->slots[slot];
	clear(mapped);
	if (dmabuf_fd < 0)
		return 0;
	size = lseek(dmabuf_fd, 0, SEEK_END);
	if (size < 0 || fstat(target_fd, &target))
		return -errno;
	mapped->memory = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, dmabuf_fd, 0);
	if (mapped->memory == MAP_FAILED && errno == EACCES) /* the kernel does not look either */
		mapped->memory = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, dmabuf_fd, 0);
	if (mapped->memory == MAP_FAILED) {
		mapped->memory = NULL;
		return -errno;
	}
	mapped->size = (size_t)size;
	mapped->device = target.st_dev;
	mapped->inode = target.st_ino;
	return 0;
}

static int32_t find(const struct dmb_emulated *emulated, const struct dmb_io *io, uint8_t **ret)
{
	uint64_t offset = (uintptr_t)io->address;
	const struct mapped *mapped;
	struct stat target;

	if (!emulated || io->buffer_slot < 0)
		return -EFAULT;
	mapped = &emulated->slots[io->buffer_slot];
	if (!mapped->memory || offset > mapped->size || io->length > mapped->size - offset)
		return -EFAULT;
	if (fstat(io->fd, &target))
		return -errno;
	if (target.st_dev != mapped->device || target.st_ino != mapped->inode)
		return -EBADF;
	*ret = mapped->memory + offset;
	return 0;
}

/* Through a block of our own: a dma-buf's mapping may have no pages that O_DIRECT could pin. */
int32_t dmb_emulate_execute(const struct dmb_emulated *emulated, const struct dmb_io *io)
{
	uint8_t *memory;
	void *block;
	int32_t rc = find(emulated, io, &memory);

	if (rc)
		return rc;
	if (posix_memalign(&block, 4096, io->length + 1U))
		return -ENOMEM;
	if (io->direction == DMB_WRITE)
		memcpy(block, memory, io->length);
	rc = (int32_t)dmb_lone(io->direction, io->fd, (uint64_t)(uintptr_t)block, io->length,
			       io->offset);
	if (io->direction == DMB_READ && rc > 0)
		memcpy(memory, block, (size_t)rc);
	free(block);
	return rc;
}
