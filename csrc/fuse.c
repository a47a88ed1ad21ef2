/* SPDX-License-Identifier: MIT */
/*
 * What answers /dev/fuse for a file system that is one file, the bytes of some memory. The protocol
 * is that of <linux/fuse.h>: a request is read with one read(2), answered with one writev(2).
 *
 * The file is open with FOPEN_DIRECT_IO: each read(2) and write(2) comes here, so that it sees what
 * devices and other processes wrote. Bytes go by way of a block of our own, since the kernel pins
 * what it is handed, and the mapping of a dma-buf has no pages to pin.
 *
 * CPU access to a dma-buf waits for its fences, and a fence may never signal. A process that waits
 * for an answer cannot be killed once the request was read, so requests for memory with unsignalled
 * fences are put aside until poll(2) on the dma-buf tells that they are, and FUSE_INTERRUPT, which
 * a signal to that process brings, ends them with EINTR.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/dma-buf.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "core.h"
#include "uapi.h"

enum {
	BLOCK = 1 << 20, /* bytes of one request at most */
	PAGE = 4096,
	HEADERS = PAGE, /* before the bytes of a write */
	MINOR = 31,	/* of the protocol, Linux 5.4: what is used here and has no flag */
};

/* Bytes to be moved: what FUSE_READ, FUSE_WRITE and FUSE_FALLOCATE ask for. */
struct access {
	struct access *next;
	uint64_t unique;
	uint64_t offset;
	uint64_t size;
	uint64_t opcode;
	uint8_t bytes[]; /* of a write */
};

/* A write's is made in the place of what the kernel sent before the bytes. */
static_assert(sizeof(struct access) == sizeof(struct fuse_write_in), "struct access");
static_assert(offsetof(struct access, bytes) == sizeof(struct access), "struct access");

struct server {
	int device;
	const struct dmb_fuse_slab *slabs;
	size_t count;
	uint64_t size;
	bool writable;
	struct timespec changed;
	struct access *aside; /* waiting for fences */
	uint8_t *in;	      /* HEADERS + BLOCK */
	uint8_t *out;	      /* BLOCK */
};

static int answer(struct server *server, uint64_t unique, int error, const void *data, size_t size)
{
	struct fuse_out_header header = {
		.len = sizeof(header) + (error ? 0 : size), .error = error, .unique = unique};
	struct iovec parts[] = {{&header, sizeof(header)}, {(void *)data, size}};

	if (writev(server->device, parts, error || !size ? 1 : 2) >= 0)
		return 0;
	return errno == ENOENT ? 0 : -errno; /* ENOENT: who asked was killed */
}

static bool is_write(const struct access *access)
{
	return access->opcode != FUSE_READ;
}

/* The first slab of a range, counting from *slab, and which part of the range lies in it. */
static bool next_part(const struct server *server, const struct access *access, size_t *slab,
		      uint64_t *start, uint64_t *skip, uint64_t *size)
{
	const uint64_t end = access->offset + access->size;
	uint64_t base = 0;

	for (size_t i = 0; i < server->count; base += server->slabs[i++].size) {
		const uint64_t from = access->offset > base ? access->offset : base;
		const uint64_t limit = base + server->slabs[i].size;

		if (i < *slab || from >= limit || from >= end)
			continue;
		*slab = i;
		*start = from - base;
		*skip = from - access->offset;
		*size = (end < limit ? end : limit) - from;
		return true;
	}
	return false;
}

/* What to poll for until the CPU may access a range; false if it may now. */
static bool must_wait(const struct server *server, const struct access *access, struct pollfd *ret)
{
	uint64_t start, skip, size;

	for (size_t i = 0; next_part(server, access, &i, &start, &skip, &size); i++) {
		ret->fd = server->slabs[i].dmabuf;
		ret->events = is_write(access) ? POLLOUT : POLLIN;
		ret->revents = 0;
		if (ret->fd >= 0 && poll(ret, 1, 0) == 0)
			return true;
	}
	return false;
}

static int sync_cpu(int dmabuf, uint64_t flags)
{
	struct dma_buf_sync sync = {.flags = flags};
	int rc;

	if (dmabuf < 0)
		return 0;
	do {
		rc = ioctl(dmabuf, DMA_BUF_IOCTL_SYNC, &sync);
	} while (rc && (errno == EINTR || errno == EAGAIN));
	return rc ? -errno : 0;
}

/* The bytes of one slab, in the bracket of DMA_BUF_IOCTL_SYNC. */
static int move_part(struct server *server, const struct access *access,
		     const struct dmb_fuse_slab *slab, uint64_t start, uint64_t skip, uint64_t size)
{
	uint8_t *memory = (uint8_t *)slab->memory + start;
	uint64_t flags = is_write(access) ? DMA_BUF_SYNC_WRITE : DMA_BUF_SYNC_READ;
	int rc;

	if ((start | size) % PAGE) /* what is written back of a cache line has to be fresh */
		flags |= DMA_BUF_SYNC_READ;
	rc = sync_cpu(slab->dmabuf, DMA_BUF_SYNC_START | flags);
	if (rc)
		return rc;
	if (access->opcode == FUSE_READ)
		memcpy(server->out + skip, memory, size);
	else if (access->opcode == FUSE_WRITE)
		memcpy(memory, access->bytes + skip, size);
	else
		memset(memory, 0, size);
	return sync_cpu(slab->dmabuf, DMA_BUF_SYNC_END | flags);
}

static int carry_out(struct server *server, const struct access *access)
{
	struct fuse_write_out written = {.size = (uint32_t)access->size};
	uint64_t start, skip, size;
	int error = 0;

	for (size_t i = 0; !error && next_part(server, access, &i, &start, &skip, &size); i++)
		error = move_part(server, access, &server->slabs[i], start, skip, size);
	if (!error && is_write(access))
		clock_gettime(CLOCK_REALTIME, &server->changed);
	if (access->opcode == FUSE_READ)
		return answer(server, access->unique, error, server->out, access->size);
	if (access->opcode == FUSE_WRITE)
		return answer(server, access->unique, error, &written, sizeof(written));
	return answer(server, access->unique, error, NULL, 0);
}

static int carry_out_or_put_aside(struct server *server, const struct access *access)
{
	const size_t bytes = access->opcode == FUSE_WRITE ? access->size : 0;
	struct access *copy, **last = &server->aside;
	struct pollfd wait;

	if (!must_wait(server, access, &wait))
		return carry_out(server, access);
	copy = malloc(sizeof(*copy) + bytes);
	if (!copy)
		return answer(server, access->unique, -ENOMEM, NULL, 0);
	memcpy(copy, access, sizeof(*copy) + bytes);
	copy->next = NULL;
	while (*last)
		last = &(*last)->next;
	*last = copy;
	return 0;
}

/* Those put aside whose fences have signalled. */
static int look_again(struct server *server)
{
	struct access **link = &server->aside, *access;
	struct pollfd wait;
	int rc = 0;

	while (!rc && (access = *link)) {
		if (must_wait(server, access, &wait)) {
			link = &access->next;
			continue;
		}
		*link = access->next;
		rc = carry_out(server, access);
		free(access);
	}
	return rc;
}

static int interrupt(struct server *server, uint64_t unique)
{
	for (struct access **link = &server->aside; *link; link = &(*link)->next) {
		struct access *access = *link;

		if (access->unique != unique)
			continue;
		*link = access->next;
		free(access);
		return answer(server, unique, -EINTR, NULL, 0);
	}
	return 0; /* answered already */
}

static int init(struct server *server, uint64_t unique, const struct fuse_init_in *in)
{
	struct dmb_fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION,
		.minor = FUSE_KERNEL_MINOR_VERSION,
		.max_readahead = in->max_readahead,
		.flags = in->flags &
			 (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | DMB_FUSE_INIT_EXT),
		.max_write = BLOCK,
		.time_gran = 1,
		.max_pages = BLOCK / PAGE,
	};

	if (in->major != FUSE_KERNEL_VERSION || in->minor < MINOR)
		return answer(server, unique, -EPROTO, NULL, 0);
	if (out.flags & DMB_FUSE_INIT_EXT) /* then the kernel has a second word, and so had `in` */
		out.flags2 = DMB_FUSE_DIRECT_IO_ALLOW_MMAP_2;
	return answer(server, unique, 0, &out, sizeof(out));
}

static int attributes(struct server *server, uint64_t unique)
{
	struct fuse_attr_out out = {
		.attr.ino = FUSE_ROOT_ID,
		.attr.size = server->size,
		.attr.blocks = server->size / 512,
		.attr.mode = S_IFREG | (server->writable ? 0600 : 0400),
		.attr.nlink = 1,
		.attr.uid = geteuid(),
		.attr.gid = getegid(),
		.attr.blksize = PAGE,
		.attr.atime = server->changed.tv_sec,
		.attr.mtime = server->changed.tv_sec,
		.attr.ctime = server->changed.tv_sec,
		.attr.atimensec = server->changed.tv_nsec,
		.attr.mtimensec = server->changed.tv_nsec,
		.attr.ctimensec = server->changed.tv_nsec,
	};

	return answer(server, unique, 0, &out, sizeof(out));
}

/*
 * The size is fixed. Opening with O_TRUNC, as a shell's > does, changes nothing, as on a block
 * device; that comes without a file handle, and ftruncate(2) with one. Times are let pass.
 */
static int set_attributes(struct server *server, uint64_t unique, const struct fuse_setattr_in *in)
{
	const bool opening = !(in->valid & FATTR_FH) && in->size == 0;

	if (in->valid & (FATTR_MODE | FATTR_UID | FATTR_GID))
		return answer(server, unique, -EPERM, NULL, 0);
	if (in->valid & FATTR_SIZE && in->size != server->size && !opening)
		return answer(server, unique, -EINVAL, NULL, 0);
	return attributes(server, unique);
}

static int open_file(struct server *server, uint64_t unique, const struct fuse_open_in *in)
{
	struct fuse_open_out out = {.open_flags = FOPEN_DIRECT_IO};

	if (!server->writable && (in->flags & O_ACCMODE) != O_RDONLY)
		return answer(server, unique, -EACCES, NULL, 0);
	return answer(server, unique, 0, &out, sizeof(out));
}

static int read_bytes(struct server *server, uint64_t unique, const struct fuse_read_in *in)
{
	struct access access = {.unique = unique, .opcode = FUSE_READ, .offset = in->offset};
	uint64_t size = in->size < BLOCK ? in->size : BLOCK;

	if (in->offset >= server->size)
		return answer(server, unique, 0, NULL, 0);
	access.size = size < server->size - in->offset ? size : server->size - in->offset;
	return carry_out_or_put_aside(server, &access);
}

/* A write that does not fit is short, and one that begins at the end ENOSPC. */
static int write_bytes(struct server *server, uint64_t unique, struct fuse_write_in *in)
{
	const uint64_t offset = in->offset;
	uint64_t size = in->size;
	struct access *access = (struct access *)in;

	if (!server->writable)
		return answer(server, unique, -EBADF, NULL, 0);
	if (offset >= server->size && size)
		return answer(server, unique, -ENOSPC, NULL, 0);
	size = size < server->size - offset ? size : server->size - offset;
	*access = (struct access){
		.unique = unique, .opcode = FUSE_WRITE, .offset = offset, .size = size};
	return carry_out_or_put_aside(server, access);
}

/* All of it is there, so there is nothing to allocate; holes are zeros. */
static int allocate(struct server *server, uint64_t unique, const struct fuse_fallocate_in *in)
{
	const uint32_t known = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE;
	struct access access = {.unique = unique, .opcode = FUSE_FALLOCATE, .offset = in->offset};

	if (!server->writable)
		return answer(server, unique, -EBADF, NULL, 0);
	if (in->mode & ~known)
		return answer(server, unique, -EOPNOTSUPP, NULL, 0);
	if (!(in->mode & FALLOC_FL_KEEP_SIZE) &&
	    (in->offset > server->size || in->length > server->size - in->offset))
		return answer(server, unique, -ENOSPC, NULL, 0);
	if (!(in->mode & ~FALLOC_FL_KEEP_SIZE) || in->offset >= server->size)
		return answer(server, unique, 0, NULL, 0);
	access.size =
		in->length < server->size - in->offset ? in->length : server->size - in->offset;
	return carry_out_or_put_aside(server, &access);
}

static int statistics(struct server *server, uint64_t unique)
{
	struct fuse_statfs_out out = {
		.st = {.blocks = server->size / PAGE, .files = 1, .bsize = PAGE, .frsize = PAGE}};

	return answer(server, unique, 0, &out, sizeof(out));
}

static int handle(struct server *server, struct fuse_in_header *header)
{
	void *in = header + 1;

	switch (header->opcode) {
	case FUSE_INIT:
		return init(server, header->unique, in);
	case FUSE_GETATTR:
		return attributes(server, header->unique);
	case FUSE_SETATTR:
		return set_attributes(server, header->unique, in);
	case FUSE_OPEN:
		return open_file(server, header->unique, in);
	case FUSE_READ:
		return read_bytes(server, header->unique, in);
	case FUSE_WRITE:
		return write_bytes(server, header->unique, in);
	case FUSE_FALLOCATE:
		return allocate(server, header->unique, in);
	case FUSE_STATFS:
		return statistics(server, header->unique);
	case FUSE_INTERRUPT:
		return interrupt(server, ((const struct fuse_interrupt_in *)in)->unique);
	case FUSE_RELEASE:
		return answer(server, header->unique, 0, NULL, 0);
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
		return 0; /* has no answer */
	default: /* the kernel does without, or tells the program that there is no such thing */
		return answer(server, header->unique, -ENOSYS, NULL, 0);
	}
}

/*
 * 1: a request was handled; 0: none was there; or -errno: -ENODEV where the file is gone, and
 * -ECONNABORTED where it went in the middle of a request, its closing for one.
 */
static int take_one(struct server *server)
{
	ssize_t got = read(server->device, server->in, HEADERS + BLOCK);
	int rc;

	if (got < 0)
		return errno == ENOENT || errno == EINTR || errno == EAGAIN ? 0 : -errno;
	rc = handle(server, (struct fuse_in_header *)server->in);
	return rc ? rc : 1;
}

/* 1: a request is there; 0: a fence has signalled, or nothing; or -errno. */
static int wait_for_news(struct server *server)
{
	size_t count = 1;
	int timeout = -1, rc;
	struct pollfd *fds;

	for (struct access *access = server->aside; access; access = access->next)
		count++;
	fds = calloc(count, sizeof(*fds));
	if (!fds)
		return -ENOMEM;
	fds[0] = (struct pollfd){.fd = server->device, .events = POLLIN};
	count = 1;
	for (struct access *access = server->aside; access; access = access->next)
		if (must_wait(server, access, &fds[count]))
			count++;
		else
			timeout = 0;
	rc = poll(fds, count, timeout);
	rc = rc < 0 && errno != EINTR ? -errno : rc > 0 && fds[0].revents;
	free(fds);
	return rc;
}

int dmb_fuse_serve(int device, const struct dmb_fuse_slab *slabs, size_t count, int writable)
{
	struct server server = {
		.device = device, .slabs = slabs, .count = count, .writable = writable};
	int rc = 0;

	for (size_t i = 0; i < count; i++)
		server.size += slabs[i].size;
	clock_gettime(CLOCK_REALTIME, &server.changed);
	server.in = malloc(HEADERS + BLOCK);
	server.out = malloc(BLOCK);
	if (!server.in || !server.out)
		rc = -ENOMEM;
	while (rc >= 0) {
		rc = server.aside ? wait_for_news(&server) : 1;
		if (rc > 0)
			rc = take_one(&server);
		if (rc >= 0 && server.aside)
			rc = look_again(&server);
	}
	while (server.aside) {
		struct access *next = server.aside->next;

		free(server.aside);
		server.aside = next;
	}
	free(server.in);
	free(server.out);
	return rc == -ENODEV || rc == -ECONNABORTED ? 0 : rc;
}
