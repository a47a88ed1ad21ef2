/* SPDX-License-Identifier: MIT */
/* sys.c, and the layouts in uapi.h against the system's headers where those have them. */
#include "test.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <linux/mempolicy.h>
#include <linux/stat.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "../uapi.h"

#ifdef STATX_DIOALIGN
static_assert(STATX_DIOALIGN == DMB_STATX_DIOALIGN, "statx(2)");
static_assert(sizeof(struct statx) == sizeof(struct dmb_statx), "statx(2)");
static_assert(offsetof(struct statx, stx_mask) == offsetof(struct dmb_statx, mask), "statx(2)");
static_assert(offsetof(struct statx, stx_dio_mem_align) ==
		      offsetof(struct dmb_statx, dio_mem_align),
	      "statx(2)");
static_assert(offsetof(struct statx, stx_dio_offset_align) ==
		      offsetof(struct dmb_statx, dio_offset_align),
	      "statx(2)");
#endif
#ifdef __NR_cachestat
static_assert(__NR_cachestat == DMB_SYS_CACHESTAT, "cachestat(2)");
#endif
#ifdef MADV_POPULATE_WRITE
static_assert(MADV_POPULATE_WRITE == DMB_MADV_POPULATE_WRITE, "madvise(2)");
#endif
#ifdef MADV_COLLAPSE
static_assert(MADV_COLLAPSE == DMB_MADV_COLLAPSE, "madvise(2)");
#endif

static void mapping_over(void)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	int fd = memfd_create("test", MFD_CLOEXEC);
	char *memory = mmap(NULL, 3 * page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t address = (uint64_t)(uintptr_t)memory;

	context("mapping over", 0);
	CHECK(memory != MAP_FAILED);
	CHECK_EQUAL(ftruncate(fd, (off_t)page), 0);
	CHECK_EQUAL(dmb_map_over(address + page, page, fd, 1), 0);
	memory[page] = 'x';
	CHECK_EQUAL(pread(fd, memory + page + 1, 1, 0), 1);
	CHECK_EQUAL(memory[page + 1], 'x');
	CHECK_EQUAL(memory[0], 0);
	CHECK_EQUAL(memory[2 * page], 0);
	CHECK_EQUAL(dmb_map_over(address, page, -1, 0), -EBADF);
	CHECK_EQUAL(dmb_map_over(address + 1, page, fd, 0), -EINVAL);
	munmap(memory, 3 * page);
	close(fd);
}

static void teeing(void)
{
	int from[2], to[2];
	char bytes[8];

	context("tee", 0);
	CHECK_EQUAL(pipe(from), 0);
	CHECK_EQUAL(pipe(to), 0);
	CHECK_EQUAL(dmb_tee(from[0], to[1], 8), -EAGAIN);
	CHECK_EQUAL(write(from[1], "12345", 5), 5);
	CHECK_EQUAL(dmb_tee(from[0], to[1], 8), 5);
	CHECK_EQUAL(read(to[0], bytes, 8), 5);
	CHECK_EQUAL(read(from[0], bytes, 8), 5);
	CHECK(!memcmp(bytes, "12345", 5));
	CHECK_EQUAL(dmb_tee(-1, to[1], 8), -EBADF);
	for (int i = 0; i < 2; i++) {
		close(from[i]);
		close(to[i]);
	}
}

static void beneath(void)
{
	int folder = open("/proc/self", O_PATH | O_DIRECTORY), fd;

	context("beneath", 0);
	fd = dmb_open_beneath(folder, "fdinfo/../stat", O_RDONLY, 0);
	CHECK(fd >= 0);
	close(fd);
	CHECK_EQUAL(dmb_open_beneath(folder, "../uptime", O_RDONLY, 0), -EXDEV);
	CHECK_EQUAL(dmb_open_beneath(folder, "/proc/uptime", O_RDONLY, 0), -EXDEV);
	CHECK(dmb_open_beneath(folder, "exe", O_RDONLY, 0) < 0); /* a magic link */
	CHECK_EQUAL(dmb_open_beneath(folder, "none", O_RDONLY, 0), -ENOENT);
	CHECK_EQUAL(dmb_open_beneath(-1, "stat", O_RDONLY, 0), -EBADF);
	close(folder);
}

static void residence(void)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	int fd = memfd_create("test", MFD_CLOEXEC);
	uint8_t pages[2] = {9, 9};
	char *memory;

	context("residence", 0);
	CHECK_EQUAL(ftruncate(fd, (off_t)(2 * page)), 0);
	CHECK_EQUAL(pwrite(fd, "x", 1, 0), 1);
	memory = mmap(NULL, 2 * page, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED);
	CHECK_EQUAL(dmb_resident((uintptr_t)memory, 2 * page, pages), 0);
	CHECK_EQUAL(pages[0] & 1, 1);
	CHECK_EQUAL(pages[1] & 1, 0);
	munmap(memory, 2 * page);
	CHECK_EQUAL(dmb_resident((uintptr_t)memory, 2 * page, pages), -ENOMEM);
	close(fd);
}

static void alignments(void)
{
	uint32_t align[2] = {77, 77};
	int pipes[2], fd = memfd_create("test", MFD_CLOEXEC);
	struct file file;

	context("alignments", 0);
	CHECK_EQUAL(dmb_statx_dio(-1, align), -EBADF);
	CHECK_EQUAL(dmb_statx_dio(fd, align), 0);
	CHECK_EQUAL(align[0], 0);
	CHECK_EQUAL(align[1], 0);
	CHECK_EQUAL(pipe(pipes), 0);
	CHECK_EQUAL(dmb_statx_dio(pipes[0], align), 0);
	CHECK_EQUAL(align[1], 0);
	close(pipes[0]);
	close(pipes[1]);
	close(fd);
	if (!file_open(&file, PAGE)) /* checks the reported alignments */
		return;
	CHECK(!(file.offset_align & (file.offset_align - 1)));
	CHECK(!(file.memory_align & (file.memory_align - 1)));
	file_close(&file);
}

static void files(void)
{
	int fd = memfd_create("test", MFD_CLOEXEC);
	struct file file;
	struct stat stat;

	context("files", 0);
	CHECK_EQUAL(dmb_mode_on_disk(-1), -EBADF);
	CHECK_EQUAL(dmb_mode_on_disk(fd), 0);
	CHECK_EQUAL(dmb_statfs_type(-1), -EBADF);
	CHECK_EQUAL(dmb_statfs_type(fd), TMPFS_MAGIC);
	CHECK_EQUAL(dmb_fallocate(-1, 0, PAGE, 0), -EBADF);
	CHECK_EQUAL(dmb_fallocate(fd, 0, PAGE, 1), 0);
	CHECK_EQUAL(fstat(fd, &stat), 0);
	CHECK_EQUAL(stat.st_size, 0);
	CHECK_EQUAL(dmb_fallocate(fd, 0, PAGE, 0), 0);
	CHECK_EQUAL(fstat(fd, &stat), 0);
	CHECK_EQUAL(stat.st_size, PAGE);
	close(fd);
	if (!file_open(&file, PAGE))
		return;
	CHECK_EQUAL(fstat(file.plain, &stat), 0);
	CHECK_EQUAL(dmb_mode_on_disk(file.plain) & S_IFMT, major(stat.st_dev) ? S_IFREG : 0);
	file_close(&file);
}

static void cache(void)
{
	struct file file;
	uint64_t pages = 77;
	int rc;

	context("cachestat", 0);
	if (!file_open(&file, 8 * PAGE))
		return;
	CHECK_EQUAL(posix_fadvise(file.plain, 0, 0, POSIX_FADV_DONTNEED), 0);
	rc = dmb_cachestat(file.plain, 0, 8 * PAGE, &pages);
	if (rc == -ENOSYS) { /* before Linux 6.5 */
		file_close(&file);
		return;
	}
	CHECK_EQUAL(rc, 0);
	CHECK_EQUAL(pages, 0);
	file_check(&file);
	CHECK_EQUAL(dmb_cachestat(file.plain, 0, 8 * PAGE, &pages), 0);
	CHECK_EQUAL(pages, 8);
	CHECK_EQUAL(dmb_cachestat(file.plain, PAGE, PAGE, &pages), 0);
	CHECK_EQUAL(pages, 1);
	CHECK_EQUAL(dmb_cachestat(-1, 0, PAGE, &pages), -EBADF);
	file_close(&file);
}

static void populate(void)
{
	unsigned char resident[8] = {0};
	struct memory memory;
	uint64_t address;
	int rc;

	context("populate", 0);
	memory_map(&memory, sizeof(resident) * PAGE);
	address = (uintptr_t)memory.bytes;
	rc = dmb_populate(address, memory.size);
	if (rc != -EINVAL) { /* before Linux 5.14 */
		CHECK_EQUAL(rc, 0);
		CHECK_EQUAL(mincore(memory.bytes, memory.size, resident), 0);
		for (size_t i = 0; i < sizeof(resident); i++)
			CHECK_EQUAL(resident[i] & 1, 1);
		CHECK(dmb_populate(address - PAGE, PAGE) < 0);
	}
	CHECK_EQUAL(dmb_bind_node(address, memory.size, 1024), -EINVAL);
	CHECK_EQUAL(dmb_bind_node(address, memory.size, 1023), -EINVAL);
	rc = dmb_bind_node(address, memory.size, 0);
	CHECK(rc == 0 || rc == -ENOSYS || rc == -EPERM); /* no NUMA, or seccomp */
	memory_unmap(&memory);
}

static void elsewhere(void)
{
	struct memory memory;
	uint64_t address;

	context("elsewhere", 0);
	memory_map(&memory, 600 * PAGE); /* more than one batch */
	address = (uintptr_t)memory.bytes;
	if (dmb_bind_node(address, memory.size, 0) == 0) {
		memset(memory.bytes, 1, memory.size);
		CHECK_EQUAL(dmb_count_elsewhere(address, memory.size, PAGE, 0), 0);
		CHECK_EQUAL(dmb_count_elsewhere(address, memory.size, PAGE, 1023), 600);
		CHECK_EQUAL(dmb_count_elsewhere(address, memory.size, 7 * PAGE, 1023), 86);
	}
	memory_unmap(&memory);
}

static void policies(void)
{
	struct dmb_policy saved, now;
	int rc;

	context("policies", 0);
	CHECK_EQUAL(dmb_policy_bind(1024, &saved), -EINVAL);
	CHECK_EQUAL(dmb_policy_restore(&saved), 0); /* nothing was saved */
	rc = dmb_policy_bind(0, &saved);
	CHECK(rc == 0 || rc == -ENOSYS || rc == -EPERM); /* no NUMA, or seccomp */
	if (rc)
		return;
	CHECK_EQUAL(saved.mode, MPOL_DEFAULT);
	CHECK_EQUAL(dmb_policy_bind(0, &now), 0); /* again: saves the policy of the first time */
	CHECK_EQUAL(now.mode, MPOL_BIND);
	CHECK_EQUAL(now.nodes[0], 1);
	CHECK_EQUAL(dmb_policy_restore(&now), 0);
	CHECK_EQUAL(dmb_policy_restore(&saved), 0);
	CHECK_EQUAL(dmb_policy_bind(0, &now), 0);
	CHECK_EQUAL(now.mode, MPOL_DEFAULT);
	CHECK_EQUAL(dmb_policy_restore(&now), 0);
}

/* Pages of a memory file that are there. */
static uint64_t there(int fd)
{
	struct stat status;

	CHECK_EQUAL(fstat(fd, &status), 0);
	return (uint64_t)status.st_blocks * 512 / PAGE;
}

static void collapse(void)
{
	const uint64_t huge = PAGE * (PAGE / 8), size = 2 * huge + 3 * PAGE;
	int fd = memfd_create("test", MFD_CLOEXEC);
	char bytes[3] = {7, 7, 7};
	uint64_t address;
	void *room;

	context("collapse", 0);
	CHECK_EQUAL(ftruncate(fd, (off_t)size), 0);
	CHECK_EQUAL(pwrite(fd, bytes, 3, (off_t)huge - 1), 3);
	room = mmap(NULL, size + huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(room != MAP_FAILED);
	address = dmb_align_up((uintptr_t)room, huge);
	CHECK_EQUAL(dmb_map_over(address, size, fd, 1), 0);
	CHECK_EQUAL(dmb_collapse(address + PAGE, size - PAGE), -EINVAL);
	CHECK_EQUAL(dmb_collapse(address, huge - PAGE), 0); /* no room for one */
	CHECK_EQUAL(there(fd), 2);
	if (!dmb_collapse(address,
			  size)) /* on Linux 6.1 and newer, where memory is not in pieces */
		CHECK_EQUAL(there(fd), 2 * huge / PAGE);
	CHECK_EQUAL(pread(fd, bytes, 3, (off_t)huge - 2), 3);
	CHECK(bytes[0] == 0 && bytes[1] == 7 && bytes[2] == 7);
	if (!madvise((void *)(uintptr_t)address, size, MADV_NOHUGEPAGE))
		CHECK_EQUAL(dmb_collapse(address, size), -EINVAL);
	munmap(room, size + huge);
	close(fd);
}

static void lone(void)
{
	struct memory memory;
	struct file file;
	uint64_t address;

	context("one read or write", 0);
	if (!file_open(&file, 1000))
		return;
	memory_map(&memory, PAGE);
	memset(memory.bytes, POISON, memory.size);
	address = (uintptr_t)memory.bytes;
	CHECK_EQUAL(dmb_read_write(DMB_READ, file.plain, address, PAGE, 100), 900);
	CHECK_EQUAL(memcmp(memory.bytes, file.bytes + 100, 900), 0);
	CHECK_EQUAL(memory.bytes[900], POISON);
	CHECK_EQUAL(dmb_read_write(DMB_WRITE, file.plain, address, 10, 990), 10);
	memcpy(file.bytes + 990, memory.bytes, 10);
	file_check(&file);
	CHECK_EQUAL(dmb_read_write(DMB_READ, -1, address, PAGE, 0), -EBADF);
	CHECK_EQUAL(dmb_read_write(DMB_READ, file.plain, 0, PAGE, 0), -EFAULT);
	file_close(&file);
	memory_unmap(&memory);
}

int main(void)
{
	mapping_over();
	teeing();
	beneath();
	residence();
	alignments();
	files();
	cache();
	populate();
	elsewhere();
	policies();
	collapse();
	lone();
	return finish();
}
