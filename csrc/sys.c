/* SPDX-License-Identifier: MIT */
/* System calls that Python does not provide. */
#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "internal.h"
#include "uapi.h"

#define NODES (8 * sizeof(((struct dmb_policy *)NULL)->nodes))

int dmb_statx_dio(int fd, uint32_t ret[2])
{
	struct dmb_statx stat;

	memset(&stat, 0, sizeof(stat));
	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, DMB_STATX_DIOALIGN, &stat))
		return -errno;
	if (stat.mask & DMB_STATX_DIOALIGN && !stat.dio_offset_align)
		return -EOPNOTSUPP;
	ret[0] = stat.mask & DMB_STATX_DIOALIGN ? stat.dio_mem_align : 0;
	ret[1] = stat.mask & DMB_STATX_DIOALIGN ? stat.dio_offset_align : 0;
	return 0;
}

int dmb_stat(int fd, struct dmb_stat *ret)
{
	const unsigned wanted = STATX_BASIC_STATS | DMB_STATX_DIOALIGN | DMB_STATX_MNT_ID_UNIQUE;
	struct dmb_statx stat;

	memset(&stat, 0, sizeof(stat));
	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, wanted, &stat))
		return -errno;
	ret->mode = stat.mode;
	ret->allocated = stat.size || stat.blocks;
	ret->mount = stat.mask & DMB_STATX_MNT_ID_UNIQUE ? stat.mnt_id : 0;
	ret->memory_align = stat.mask & DMB_STATX_DIOALIGN ? stat.dio_mem_align : 0;
	ret->offset_align = stat.mask & DMB_STATX_DIOALIGN ? stat.dio_offset_align : 0;
	return 0;
}

int dmb_mode_on_disk(int fd)
{
	struct dmb_statx stat;

	memset(&stat, 0, sizeof(stat));
	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &stat))
		return -errno;
	return stat.dev_major ? stat.mode : 0;
}

int64_t dmb_statfs_type(int fd)
{
	struct statfs stat;

	return fstatfs(fd, &stat) ? -errno : (int64_t)stat.f_type;
}

int dmb_open_beneath(int folder, const char *path, int flags, unsigned mode)
{
	struct dmb_open_how how = {
		.flags = (unsigned)flags,
		.mode = mode,
		.resolve = DMB_RESOLVE_BENEATH | DMB_RESOLVE_NO_MAGICLINKS,
	};
	long rc = syscall(DMB_SYS_OPENAT2, folder, path, &how, sizeof(how));

	return rc < 0 ? -errno : (int)rc;
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

int dmb_fallocate(int fd, uint64_t offset, uint64_t size, int keep_size)
{
	const int how = keep_size ? FALLOC_FL_KEEP_SIZE : 0;

	return fallocate(fd, how, (off_t)offset, (off_t)size) ? -errno : 0;
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

/* A page table of 8-byte entries fills one page: 2 MiB for pages of 4 KiB. */
uint64_t dmb_huge_page(void)
{
	const uint64_t page = dmb_page();

	return page * (page / 8);
}

/* MADV_COLLAPSE needs at least one ordinary page of each huge page to be present. */
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

/* Set a mask of NUMA nodes, of as many bits as struct dmb_policy has, to one node. */
static int one_node(unsigned node, unsigned long *mask)
{
	const unsigned bits = 8 * sizeof(*mask);

	if (node >= NODES)
		return -EINVAL;
	mask[node / bits] = 1UL << node % bits;
	return 0;
}

int dmb_bind_node(uint64_t address, uint64_t size, unsigned node)
{
	struct dmb_policy policy = {0};
	int rc = one_node(node, policy.nodes);

	if (!rc && syscall(SYS_mbind, (void *)(uintptr_t)address, size, MPOL_BIND, policy.nodes,
			   NODES + 1, 0))
		rc = -errno;
	return rc;
}

int64_t dmb_count_elsewhere(uint64_t address, uint64_t size, uint64_t step, unsigned node)
{
	enum { BATCH = 256 };
	void *pages[BATCH];
	int where[BATCH];
	int64_t elsewhere = 0;

	for (uint64_t at = 0; at < size;) {
		unsigned long count = 0;

		for (; count < BATCH && at < size; at += step)
			pages[count++] = (void *)(uintptr_t)(address + at);
		if (syscall(SYS_move_pages, 0, count, pages, NULL, where, 0))
			return -errno;
		for (unsigned long i = 0; i < count; i++)
			elsewhere += where[i] != (int)node;
	}
	return elsewhere;
}

int dmb_policy_bind(unsigned node, struct dmb_policy *ret)
{
	struct dmb_policy bound = {0};
	int rc = one_node(node, bound.nodes);

	ret->mode = -1;
	if (rc)
		return rc;
	if (syscall(SYS_get_mempolicy, &bound.mode, ret->nodes, NODES, NULL, 0) ||
	    syscall(SYS_set_mempolicy, MPOL_BIND, bound.nodes, NODES + 1))
		return -errno;
	ret->mode = bound.mode;
	return 0;
}

int dmb_policy_restore(const struct dmb_policy *policy)
{
	const unsigned long *nodes = policy->mode == MPOL_DEFAULT ? NULL : policy->nodes;

	if (policy->mode < 0)
		return 0;
	return syscall(SYS_set_mempolicy, policy->mode, nodes, nodes ? NODES + 1 : 0) ? -errno : 0;
}
