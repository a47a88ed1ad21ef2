/* SPDX-License-Identifier: MIT */
/* System calls that Python has no names for. */
#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "internal.h"
#include "uapi.h"

int dmb_statx_dio(int fd, uint32_t *memory_align, uint32_t *offset_align)
{
	struct dmb_statx stat;

	memset(&stat, 0, sizeof(stat));
	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, DMB_STATX_DIOALIGN, &stat))
		return -errno;
	if (stat.mask & DMB_STATX_DIOALIGN && !stat.dio_offset_align)
		return -EOPNOTSUPP;
	*memory_align = stat.mask & DMB_STATX_DIOALIGN ? stat.dio_mem_align : 0;
	*offset_align = stat.mask & DMB_STATX_DIOALIGN ? stat.dio_offset_align : 0;
	return 0;
}

int64_t dmb_statfs_type(int fd)
{
	struct statfs stat;

	return fstatfs(fd, &stat) ? -errno : (int64_t)stat.f_type;
}

int dmb_cachestat(int fd, uint64_t offset, uint64_t size, uint64_t *ret)
{
	struct dmb_cachestat_range range = {.offset = offset, .size = size};
	struct dmb_cachestat stat;

	if (syscall(DMB_SYS_CACHESTAT, fd, &range, &stat, 0))
		return -errno;
	*ret = stat.cached;
	return 0;
}

int dmb_resident(uint64_t address, uint64_t size, uint8_t *ret)
{
	return mincore((void *)(uintptr_t)address, size, ret) ? -errno : 0;
}

int dmb_tee(int from, int to, uint64_t size)
{
	ssize_t rc = tee(from, to, size, SPLICE_F_NONBLOCK);

	return rc < 0 ? -errno : (int)rc;
}

/*
 * Whether pages of a file were dropped from the page cache. One is once it is not there: a page
 * that comes later is read after the write. Pages that are dirty or under I/O are not dropped, nor
 * are those of a folio that reaches beyond the range, hence the second, wider try. Before Linux 6.5
 * there is no cachestat(2), and nothing shows what was not dropped.
 */
static bool drop(int fd, uint64_t start, uint64_t end)
{
	const uint64_t huge = dmb_huge_page();
	uint64_t pages = 0;
	int rc;

	for (int tries = 0;; tries++) {
		rc = dmb_cachestat(fd, start, end - start, &pages);
		if ((!rc && !pages) || tries == 2)
			return !rc && !pages;
		if (rc || tries)
			posix_fadvise(
				fd, (off_t)dmb_align_down(start, huge),
				(off_t)(dmb_align_up(end, huge) - dmb_align_down(start, huge)),
				POSIX_FADV_DONTNEED);
		else
			posix_fadvise(fd, (off_t)start, (off_t)(end - start), POSIX_FADV_DONTNEED);
		if (rc)
			return true;
	}
}

bool dmb_drop_range(int fd, uint64_t *at, uint64_t end)
{
	const uint64_t page = dmb_page();
	uint64_t size = end - *at;

	while (*at < end) {
		size = dmb_min(size, end - *at);
		if (drop(fd, *at, *at + size)) {
			*at += size;
			size *= 2;
		} else if (size > page) { /* while others read it, all of it may never be gone */
			size = dmb_align_up(size / 2, page);
		} else {
			return false;
		}
	}
	return true;
}

int dmb_fallocate(int fd, uint64_t offset, uint64_t size, int keep_size)
{
	const int how = keep_size ? FALLOC_FL_KEEP_SIZE : 0;

	return fallocate(fd, how, (off_t)offset, (off_t)size) ? -errno : 0;
}

int dmb_punch(int fd, uint64_t size)
{
	const int how = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

	return fallocate(fd, how, 0, (off_t)size) ? -errno : 0;
}

int dmb_populate(uint64_t address, uint64_t size)
{
	return madvise((void *)(uintptr_t)address, size, DMB_MADV_POPULATE_WRITE) ? -errno : 0;
}

int dmb_map_over(uint64_t address, uint64_t size, int fd, int writable)
{
	int protection = PROT_READ | (writable ? PROT_WRITE : 0);
	void *mapped =
		mmap((void *)(uintptr_t)address, size, protection, MAP_SHARED | MAP_FIXED, fd, 0);

	return mapped == MAP_FAILED ? -errno : 0;
}

uint64_t dmb_page(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* With pages of 4 KiB huge ones have 2 MiB. */
uint64_t dmb_huge_page(void)
{
	const uint64_t page = dmb_page();

	return page * (page / 8);
}

/* One ordinary page of each is to be there. */
int dmb_collapse(uint64_t address, uint64_t size)
{
	const uint64_t page = dmb_page(), huge = dmb_huge_page();
	const uint64_t whole = dmb_align_down(size, huge);
	int rc = address % huge ? -EINVAL : 0;

	for (uint64_t at = 0; !rc && at < whole; at += huge)
		rc = dmb_populate(address + at, page);
	if (!rc && whole && madvise((void *)(uintptr_t)address, whole, DMB_MADV_COLLAPSE))
		rc = -errno;
	return rc;
}

int dmb_bind_node(uint64_t address, uint64_t size, unsigned node)
{
	unsigned long mask[16] = {0};
	const unsigned bits = 8 * sizeof(mask[0]);

	if (node >= bits * sizeof(mask) / sizeof(mask[0]))
		return -EINVAL;
	mask[node / bits] = 1UL << node % bits;
	return syscall(SYS_mbind, (void *)(uintptr_t)address, size, MPOL_BIND, mask,
		       8 * sizeof(mask) + 1, 0)
		       ? -errno
		       : 0;
}

int dmb_fanotify_group(void)
{
	const unsigned flags = FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK;
	int group = fanotify_init(flags | FAN_UNLIMITED_MARKS, O_RDONLY | O_CLOEXEC);

	if (group < 0 && errno == EPERM)
		group = fanotify_init(flags | FAN_REPORT_FID, O_RDONLY | O_CLOEXEC);
	return group < 0 ? -errno : group;
}

int dmb_fanotify_mark(int group, int fd)
{
	const unsigned flags = FAN_MARK_ADD | DMB_FAN_MARK_EVICTABLE | FAN_MARK_IGNORED_MASK |
			       FAN_MARK_IGNORED_SURV_MODIFY;

	return fanotify_mark(group, flags, FAN_OPEN, fd, NULL) ? -errno : 0;
}
