/* SPDX-License-Identifier: MIT */
/* The native route without a kernel that has it: a table of mapped dma-bufs, for tests. */
#include <errno.h>
#include <stdlib.h>
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
	if (mapped->memory == MAP_FAILED) {
		mapped->memory = NULL;
		return -errno;
	}
	mapped->size = (size_t)size;
	mapped->device = target.st_dev;
	mapped->inode = target.st_ino;
	return 0;
}

int dmb_emulate_address(struct dmb_emulated *emulated, const struct dmb_io *io, uint8_t **ret)
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
