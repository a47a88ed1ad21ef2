/* SPDX-License-Identifier: MIT */
/* The system calls of the core, on the virtual kernel: the linker's --wrap brings them here. */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "../../uapi.h"
#include "rings.h"

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void __real_free(void *memory);
void *__real_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t size);
int __real_fstat(int fd, struct stat *ret);
int __real_fstatfs(int fd, struct statfs *ret);
int __real_poll(struct pollfd *fds, nfds_t count, int timeout);
int __real_eventfd_write(int fd, eventfd_t value);
long __real_syscall(long number, ...);

static int64_t answer(int64_t rc)
{
	if (rc >= 0)
		return rc;
	errno = (int)-rc;
	return -1;
}

static bool no_memory(void)
{
	if (!world.failing || !chance(world.faults.memory))
		return false;
	happened("no memory", 0, 0, 0);
	world.errors[ENOMEM] = true;
	errno = ENOMEM;
	return true;
}

/* -- memory */

void *__wrap_malloc(size_t size)
{
	void *memory = no_memory() ? NULL : __real_malloc(size);

	world.allocations += memory != NULL;
	return memory;
}

void *__wrap_calloc(size_t count, size_t size)
{
	void *memory = no_memory() ? NULL : __real_calloc(count, size);

	world.allocations += memory != NULL;
	return memory;
}

void __wrap_free(void *memory)
{
	world.allocations -= memory != NULL;
	__real_free(memory);
}

void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
	void *memory;

	if (no_memory())
		return MAP_FAILED;
	memory = __real_mmap(at, size, protection, flags, fd, offset);
	world.allocations += memory != MAP_FAILED;
	return memory;
}

int __wrap_munmap(void *at, size_t size)
{
	world.allocations--;
	return __real_munmap(at, size);
}

/* -- time */

int __wrap_clock_gettime(clockid_t clock, struct timespec *ret)
{
	(void)clock;
	ret->tv_sec = (time_t)(now_ns() / 1000000000);
	ret->tv_nsec = (long)(now_ns() % 1000000000);
	return 0;
}

int __wrap_nanosleep(const struct timespec *time, struct timespec *left)
{
	(void)left;
	time_passes((uint64_t)time->tv_sec * 1000000000 + (uint64_t)time->tv_nsec);
	return 0;
}

/* The core's warning of a device that does not answer. */
int __wrap_fprintf(FILE *file, const char *format, ...)
{
	(void)file;
	(void)format;
	happened("warning", 0, 0, 0);
	return 0;
}

/* -- files */

ssize_t __wrap_pread(int fd, void *memory, size_t size, off_t offset)
{
	return answer(transfer_now(false, fd, memory, size, (uint64_t)offset));
}

ssize_t __wrap_pwrite(int fd, const void *memory, size_t size, off_t offset)
{
	return answer(transfer_now(true, fd, (void *)(uintptr_t)memory, size, (uint64_t)offset));
}

int __wrap_fstat(int fd, struct stat *ret)
{
	if (!is_virtual(fd))
		return __real_fstat(fd, ret);
	memset(ret, 0, sizeof(*ret));
	ret->st_mode = world.file.passthrough ? S_IFCHR : world.file.device ? S_IFBLK : S_IFREG;
	ret->st_size = world.file.device ? 0 : (off_t)world.file.size;
	return 0;
}

/* tmpfs passes for ext4, and statx(2) below states an alignment, so that Python's files need no
 * disk. */
int __wrap_fstatfs(int fd, struct statfs *ret)
{
	int rc = __real_fstatfs(fd, ret);

	if (!rc && ret->f_type == TMPFS_MAGIC)
		ret->f_type = EXT4_SUPER_MAGIC;
	return rc;
}

int __wrap_ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	(void)fd;
	if (request == BLKGETSIZE64) {
		*(uint64_t *)argument = world.file.size;
		return 0;
	}
	if (request == DMB_NVME_IOCTL_IO_CMD) {
		const struct dmb_nvme_cmd *command = argument;

		return (int)answer(command_now(
			command->opcode == 1, (uint8_t *)(uintptr_t)command->addr,
			command->data_len,
			((uint64_t)command->cdw11 << 32 | command->cdw10) * world.file.block));
	}
	broken("ioctl %#lx", request);
}

int __wrap_sync_file_range(int fd, off_t offset, off_t size, unsigned flags)
{
	(void)flags;
	if (!is_virtual(fd))
		return 0;
	return (int)answer(flush_now((uint64_t)offset, (uint64_t)size));
}

int __wrap_posix_fadvise(int fd, off_t offset, off_t size, int advice)
{
	(void)advice;
	if (is_virtual(fd))
		pages_drop((uint64_t)offset, size ? (uint64_t)(offset + size) : FILE_MOST);
	return 0;
}

int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout)
{
	if (fds->fd < SLAB_FD || fds->fd >= SLAB_FD + SLABS)
		return __real_poll(fds, count, timeout);
	fds->revents = fds->events;
	return 1;
}

int __wrap_eventfd_write(int fd, eventfd_t value)
{
	if (fd != EVENT_FD)
		return __real_eventfd_write(fd, value);
	world.signals++;
	return 0;
}

long __wrap_syscall(long number, ...)
{
	const int count = number == SYS_statx ? 5 : number == SYS_mbind ? 6 : 4;
	long a[6] = {0}, rc;
	va_list arguments;

	va_start(arguments, number);
	for (int i = 0; i < count; i++)
		a[i] = va_arg(arguments, long);
	va_end(arguments);
	if (number == SYS_io_uring_register)
		return answer(ring_register((int)a[0], (unsigned)a[1], (void *)a[2]));
	if (number == DMB_SYS_CACHESTAT) {
		const struct dmb_cachestat_range *range = (void *)a[1];
		struct dmb_cachestat *stat = (void *)a[2];

		memset(stat, 0, sizeof(*stat));
		if (is_virtual((int)a[0]))
			stat->cached = pages_count(range->offset, range->offset + range->size);
		return 0;
	}
	rc = __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (number == SYS_statx && !rc) {
		struct dmb_statx *stat = (void *)a[4];

		stat->mask |= DMB_STATX_DIOALIGN;
		stat->dio_mem_align = stat->dio_offset_align = 512;
	}
	return rc;
}
