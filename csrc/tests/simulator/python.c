/* SPDX-License-Identifier: MIT */
/* For Python: what happens to the real files of its episodes, beside its requests. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "rings.h"

int __real_fstat(int fd, struct stat *ret);
ssize_t __real_pwrite(int fd, const void *memory, size_t size, off_t offset);

uint32_t virtual_lies(void)
{
	uint32_t lies = (uint32_t)world.lies;

	world.lies = 0;
	return lies;
}

uint32_t virtual_resets(void)
{
	return (uint32_t)world.resets;
}

void virtual_loud(int loud)
{
	world.loud = loud;
}

uint64_t virtual_history(void)
{
	return history();
}

/* -- another program */

static struct {
	int fd;
	uint32_t append, cut;
	uint64_t at, size; /* what it appended */
	off_t end;	   /* of the file that it has cut; 0: it has not */
} other = {.fd = -1};

void virtual_share(int fd, uint32_t append, uint32_t cut)
{
	if (other.end && ftruncate(other.fd, other.end))
		broken("the real file answers %d", errno);
	memset(&other, 0, sizeof(other));
	other.fd = fd;
	other.append = append;
	other.cut = cut;
}

uint64_t virtual_appended(uint64_t *at)
{
	*at = other.at;
	return other.size;
}

static void append(off_t end)
{
	uint8_t bytes[3000];

	other.at = (uint64_t)end;
	other.size = 1 + choose(sizeof(bytes));
	happened("others append", other.at, other.size, 0);
	memset(bytes, APPENDED, sizeof(bytes));
	if (__real_pwrite(other.fd, bytes, other.size, end) != (ssize_t)other.size)
		broken("the real file answers %d", errno);
}

/* Cut the file, and make it as long again at another time. */
static void cut(off_t end)
{
	const off_t to = other.end ? other.end : (off_t)choose((uint64_t)end + 1);

	happened("others cut", (uint64_t)to, (uint64_t)end, 0);
	if (ftruncate(other.fd, to))
		broken("the real file answers %d", errno);
	if (other.end)
		other.cut = 0;
	other.end = other.end ? 0 : end;
}

void others_in_real_file(void)
{
	struct stat stat;

	if (other.fd < 0 || __real_fstat(other.fd, &stat))
		return;
	if (!other.size && chance(other.append))
		append(stat.st_size);
	if (chance(other.cut))
		cut(stat.st_size);
}

/* -- what the caller forbids */

static bool must_sync, must_not_wait;
static const char *violation;

void virtual_forbid(int unsynced, int waits)
{
	must_sync = unsynced;
	must_not_wait = waits;
}

const char *virtual_violation(void)
{
	const char *found = violation;

	violation = NULL;
	return found;
}

void check_sync(const struct request *request)
{
	if (must_sync && request->write && !is_virtual(request->fd) &&
	    !(fcntl(request->fd, F_GETFL) & O_DSYNC))
		violation = "a write by a descriptor that lacks the caller's O_DSYNC";
}

void check_wait(void)
{
	if (must_not_wait)
		violation = "an event loop waits until the kernel lets go of a dma-buf";
}
