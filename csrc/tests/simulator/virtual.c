/* SPDX-License-Identifier: MIT */
/* The virtual kernel: decisions, the clock, the file with its page cache, and the requests. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "rings.h"

enum { REQUESTS = 512, LOST_MS = 35000 };

struct world world;

void __real_free(void *memory);
ssize_t __real_pread(int fd, void *memory, size_t size, off_t offset);
ssize_t __real_pwrite(int fd, const void *memory, size_t size, off_t offset);
int __real_fstat(int fd, struct stat *ret);

/* -- the clock and the requests */

static struct {
	uint64_t now;
	uint64_t numbers;
	unsigned used; /* requests up to the last that is used */
	struct request requests[REQUESTS];
} kernel;

uint64_t now_ns(void)
{
	return kernel.now;
}

void world_reset(void)
{
	const bool loud = world.loud;

	/* the cache's bytes have no meaning while its pages are absent */
	memset(world.file.pages, 0, sizeof(world.file.pages));
	memset(world.file.busy_until, 0, sizeof(world.file.busy_until));
	memset(world.file.bad, 0, sizeof(world.file.bad));
	memset((uint8_t *)&world + offsetof(struct world, slabs), 0,
	       sizeof(world) - offsetof(struct world, slabs));
	world.loud = loud;
	world.truncated = UINT64_MAX;
	for (unsigned i = 0; i < kernel.used; i++)
		kernel.requests[i].used = false;
	kernel.now = 1000000000;
	kernel.numbers = kernel.used = 0;
}

struct request *request_new(void)
{
	unsigned at = 0;

	while (at < kernel.used && kernel.requests[at].used)
		at++;
	if (at == REQUESTS)
		broken("more than %d requests in flight", REQUESTS);
	if (at == kernel.used)
		kernel.used++;
	kernel.requests[at] = (struct request){.used = true, .fd = -1, .number = ++kernel.numbers};
	return &kernel.requests[at];
}

static void request_end(struct request *request)
{
	slot_put(request->slot);
	request->used = false;
	while (kernel.used && !kernel.requests[kernel.used - 1].used)
		kernel.used--;
}

unsigned in_flight_between(const void *from, const void *to)
{
	unsigned count = 0;

	for (unsigned i = 0; i < kernel.used; i++) {
		const struct request *request = &kernel.requests[i];

		count += request->used && request->user_data >= (uintptr_t)from &&
			 request->user_data < (uintptr_t)to;
	}
	return count;
}

unsigned in_flight(void)
{
	return in_flight_between(NULL, (const void *)UINTPTR_MAX);
}

void slot_put(struct slot *slot)
{
	if (!slot || --slot->users)
		return;
	if (slot->mapped)
		munmap(slot->memory, slot->size);
	__real_free(slot);
}

/* -- files */

/* A real file, opened again without O_DIRECT: only Python uses real ones. */
static struct real {
	dev_t device;
	ino_t inode;
	int fd;
} reals[16];

bool is_virtual(int fd)
{
	return fd == DIRECT_FD || fd == PLAIN_FD;
}

bool same_file(int fd, int other)
{
	struct stat one, two;

	if (fd == other || (is_virtual(fd) && is_virtual(other)))
		return true;
	if (is_virtual(fd) || is_virtual(other))
		return false;
	return !__real_fstat(fd, &one) && !__real_fstat(other, &two) && one.st_dev == two.st_dev &&
	       one.st_ino == two.st_ino;
}

static int open_again(int fd)
{
	static unsigned next;
	struct real *found;
	struct stat stat;
	char path[64];

	if (__real_fstat(fd, &stat))
		return -1;
	for (unsigned i = 0; i < 16; i++)
		if (reals[i].inode == stat.st_ino && reals[i].device == stat.st_dev)
			return reals[i].fd;
	found = &reals[next++ % 16];
	if (found->inode)
		close(found->fd);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	*found = (struct real){stat.st_dev, stat.st_ino, open(path, O_RDWR | O_CLOEXEC)};
	if (found->fd < 0)
		found->fd = open(path, O_RDONLY | O_CLOEXEC);
	return found->fd;
}

static uint64_t size_of(int fd)
{
	struct stat stat;

	if (is_virtual(fd))
		return world.file.size;
	return __real_fstat(fd, &stat) ? 0 : (uint64_t)stat.st_size;
}

static void write_out_page(unsigned page)
{
	uint64_t start = (uint64_t)page * VIRTUAL_PAGE, size = VIRTUAL_PAGE;

	if (world.file.pages[page] != DIRTY)
		return;
	if (start + size > world.file.size)
		size = world.file.size > start ? world.file.size - start : 0;
	memcpy(world.file.medium + start, world.file.cache + start, size);
	world.file.pages[page] = CLEAN;
}

static unsigned page_after(uint64_t end)
{
	uint64_t page = (end + VIRTUAL_PAGE - 1) / VIRTUAL_PAGE;

	return page > FILE_PAGES ? FILE_PAGES : (unsigned)page;
}

static void write_out(uint64_t start, uint64_t end)
{
	for (unsigned page = (unsigned)(start / VIRTUAL_PAGE); page < page_after(end); page++)
		write_out_page(page);
}

void file_write_out(void)
{
	write_out(0, FILE_MOST);
	memset(world.file.pages, 0, sizeof(world.file.pages));
}

void file_view(uint8_t *ret)
{
	memcpy(ret, world.file.medium, world.file.size);
	for (unsigned page = 0; page < page_after(world.file.size); page++)
		if (world.file.pages[page] != ABSENT)
			memcpy(ret + page * VIRTUAL_PAGE, world.file.cache + page * VIRTUAL_PAGE,
			       VIRTUAL_PAGE);
}

/* Read a page, and those that the cache takes with it, from the medium. */
static void bring(unsigned page, bool whole_folio)
{
	struct virtual_file *file = &world.file;
	unsigned first = page, last = page + 1;

	if (whole_folio) {
		first = page / file->folio * file->folio;
		last = first + file->folio;
	}
	for (page = first; page < last && page < page_after(file->size); page++) {
		uint64_t start = (uint64_t)page * VIRTUAL_PAGE, size = VIRTUAL_PAGE;

		if (file->pages[page] != ABSENT)
			continue;
		if (start + size > file->size) {
			size = file->size - start;
			memset(file->cache + start + size, 0, VIRTUAL_PAGE - size);
		}
		memcpy(file->cache + start, file->medium + start, size);
		file->pages[page] = CLEAN;
	}
}

/* Drop clean pages. A folio that another program holds stays unless `wait` for it. */
static void drop(uint64_t start, uint64_t end, bool wait)
{
	struct virtual_file *file = &world.file;
	unsigned last = wait ? page_after(end) : (unsigned)(end / VIRTUAL_PAGE);
	unsigned first = wait ? (unsigned)(start / VIRTUAL_PAGE) : page_after(start);

	if (!wait && end >= file->size)
		last = page_after(end); /* the last page may be partial */
	if (last > FILE_PAGES)
		last = FILE_PAGES;
	for (unsigned page = first; page < last; page++) {
		unsigned folio = page / file->folio * file->folio;
		bool keep = file->pages[page] == DIRTY || file->busy_until[page] > kernel.now;

		if (!wait && (folio < first || folio + file->folio > last) && file->folio > 1)
			keep = keep || folio + file->folio <= page_after(file->size);
		if (file->pages[page] == CLEAN && (wait || !keep))
			file->pages[page] = ABSENT;
	}
}

static void through_cache(bool write, uint8_t *memory, uint64_t offset, uint64_t size)
{
	struct virtual_file *file = &world.file;

	while (size) {
		unsigned page = (unsigned)(offset / VIRTUAL_PAGE);
		uint64_t part = VIRTUAL_PAGE - offset % VIRTUAL_PAGE;

		part = part < size ? part : size;
		if (!write || part < VIRTUAL_PAGE)
			bring(page, !write);
		if (write) {
			memcpy(file->cache + offset, memory, part);
			file->pages[page] = DIRTY;
		} else {
			memcpy(memory, file->cache + offset, part);
		}
		offset += part;
		memory += part;
		size -= part;
	}
}

/* -- what other programs do */

static void cut_file(void)
{
	struct virtual_file *file = &world.file;
	uint64_t size = world.truncated;
	unsigned page = page_after(size);

	world.truncated = UINT64_MAX;
	if (size >= file->size)
		return;
	happened("others cut the file", size, file->size, 0);
	memset(file->medium + size, 0, file->size - size);
	memset(file->cache + size, 0, FILE_MOST - size);
	memset(file->pages + page, 0, (FILE_PAGES - page) * sizeof(*file->pages));
	file->size = size;
}

static void others(void)
{
	struct virtual_file *file = &world.file;
	unsigned page, count;

	others_in_real_file();
	if (world.truncated != UINT64_MAX && chance(100))
		cut_file();
	if (world.failing && chance(world.faults.reset)) {
		world.resets++;
		happened("reset", 0, 0, 0);
	}
	if (!world.others || !chance(150))
		return;
	page = (unsigned)choose(FILE_PAGES);
	count = 1 + (unsigned)choose(6);
	switch (choose(4)) {
	case 0:
		happened("others read", page, count, 0);
		for (unsigned i = page; i < page + count && i < page_after(file->size); i++) {
			bring(i, true);
			if (chance(300))
				file->busy_until[i] =
					kernel.now + choose(choose(8) == 7 ? 300000000 : 3000000);
		}
		break;
	case 1:
		happened("write out", page, count, 0);
		write_out((uint64_t)page * VIRTUAL_PAGE, (uint64_t)(page + count) * VIRTUAL_PAGE);
		break;
	default:
		happened("reclaim", page, count, 0);
		drop((uint64_t)page * VIRTUAL_PAGE, (uint64_t)(page + count) * VIRTUAL_PAGE, false);
	}
}

/* -- the course of a request */

static void answered(int error)
{
	if (error < 0 && error > -256)
		world.errors[-error] = true;
}

/* The block in which O_DIRECT counts. Of a real file it may be a page. */
static uint64_t unit(const struct request *request)
{
	if (!request->direct)
		return 1;
	if (is_virtual(request->fd))
		return world.file.block;
	return (request->offset | request->length) % VIRTUAL_PAGE ? 512 : VIRTUAL_PAGE;
}

/* A part of a request, in whole blocks; 0 and all of it are parts. */
static uint64_t part_of(const struct request *request)
{
	return choose(request->length / unit(request) + 1) * unit(request);
}

static int one_of_the_errors(void)
{
	static const int errors[] = {EIO,    ENOSPC,	ENOMEM, ENODATA, EILSEQ,
				     EFAULT, EREMOTEIO, ENXIO,	EINVAL};

	return -errors[choose(sizeof(errors) / sizeof(*errors))];
}

/* What the kernel refuses when it looks at a request. */
static int refusal(const struct request *request)
{
	const struct virtual_file *file = &world.file;
	const struct slot *slot = request->slot;
	uint64_t where = (uintptr_t)request->memory;

	if (slot && slot->target >= 0) {
		if (slot->resets != world.resets)
			return choose(2) ? -ENOENT : -ENODEV;
		if (!same_file(slot->target, request->fd))
			return -EBADF;
	}
	if (!is_virtual(request->fd) || !request->direct)
		return 0;
	if ((request->offset | request->length) % file->block)
		return -EINVAL;
	if (where % file->memory_align)
		return -EINVAL;
	return 0;
}

static void decide(struct request *request)
{
	const struct faults *faults = &world.faults;

	request->limit = request->length;
	if (!world.failing || request->pause)
		return;
	if (request->ring && chance(faults->again)) { /* synchronous calls do not answer so */
		request->error = choose(2) ? -EINTR : -EAGAIN;
		request->limit = choose(2) ? part_of(request) : 0;
	} else if (chance(faults->error)) {
		request->error = request->flush ? -EIO : one_of_the_errors();
		request->limit = part_of(request);
	} else if (chance(faults->short_count) && !request->passthrough) {
		request->limit = part_of(request);
		if (!request->limit)
			request->limit = request->length;
	}
	if (request->passthrough && request->error) {
		static const int statuses[][2] = {{0x281, EIO},	   {0x006, EIO},   {0x022, EAGAIN},
						  {0x002, EINVAL}, {0x020, EROFS}, {0x284, EILSEQ},
						  {0x287, ENODATA}};
		uint64_t which = choose(7);

		request->status = statuses[which][0];
		answered(-statuses[which][1]);
		request->error = 0;
	}
	if (chance(faults->lost) && request->ring) {
		request->at += (uint64_t)LOST_MS * 1000000;
		request->error = request->passthrough ? 0 : -EIO;
		request->status = request->passthrough ? 0x371 : 0;
		answered(-EIO);
	}
	if (request->direct && !request->flush && chance(faults->lie))
		request->lie = 1 + (enum lie)choose(CORRUPTED);
}

static uint64_t latency(void)
{
	return 500 + choose(1 + world.faults.latency * 1000ULL);
}

void request_start(struct request *request)
{
	happened(request->pause	  ? "timeout"
		 : request->flush ? "flush"
		 : request->write ? "write"
				  : "read",
		 request->number, request->offset, request->length);
	request->at = kernel.now + latency();
	if (request->pause) {
		request->at = kernel.now + request->length;
		return;
	}
	if (!request->error && !request->flush && !request->ending)
		request->error = refusal(request);
	if (request->error) {
		answered(request->error);
		request->limit = 0;
		request->ending = true;
		return;
	}
	check_sync(request);
	decide(request);
	answered(request->error);
	if (request->direct && is_virtual(request->fd)) {
		write_out(request->offset, request->offset + request->length);
		if (request->write)
			drop(request->offset, request->offset + request->length, true);
	}
}

/* Where a piece meets a bad block; its end if it meets none. */
static uint64_t first_bad(const struct request *request, uint64_t end)
{
	if (!is_virtual(request->fd) || !request->direct)
		return end;
	for (uint64_t at = request->offset + request->moved; at < request->offset + end; at += 512)
		if (world.file.bad[at / 512])
			return at - request->offset;
	return end;
}

static void move(const struct request *request, bool write, uint64_t skip, uint64_t from,
		 uint64_t size)
{
	uint8_t *memory = request->memory + skip;
	uint64_t offset = request->offset + from;
	int64_t rc = 0;

	if (!size)
		return;
	if (is_virtual(request->fd) && !request->direct)
		through_cache(write, memory, offset, size);
	else if (is_virtual(request->fd) && write)
		memcpy(world.file.medium + offset, memory, size);
	else if (is_virtual(request->fd))
		memcpy(memory, world.file.medium + offset, size);
	else if (write)
		rc = __real_pwrite(open_again(request->fd), memory, size, (off_t)offset);
	else
		rc = __real_pread(open_again(request->fd), memory, size, (off_t)offset);
	if (rc < 0)
		broken("the real file answers %d", errno);
}

/* All bytes of a request of a device that lies. */
static void move_falsely(const struct request *request, uint64_t size)
{
	const bool write = request->write;
	uint64_t half = size / 1024 * 512;

	world.lies++;
	happened("lie", request->number, request->lie, size);
	switch (request->lie) {
	case HONEST:
	case DROPPED:
		break;
	case PARTIAL:
		move(request, write, 0, 0, half);
		break;
	case MISDIRECTED: /* the two halves in the wrong order */
		move(request, write, 0, half, half);
		move(request, write, half, 0, half);
		break;
	case TORN:
		for (uint64_t at = 0; at < size; at += 1024)
			move(request, write, at, at, size - at < 512 ? size - at : 512);
		break;
	case CORRUPTED:
		move(request, write, 0, 0, size);
		if (size && !write) {
			request->memory[choose(size)] ^= (uint8_t)(1U << choose(8));
		} else if (size) {
			uint64_t at = choose(size);
			uint8_t before = request->memory[at];

			request->memory[at] ^= (uint8_t)(1U << choose(8));
			move(request, write, at, at, 1);
			request->memory[at] = before;
		}
	}
}

static void end_of_file(struct request *request)
{
	uint64_t from = request->moved, size = request->length - from;

	request->ending = true;
	if (!request->direct || request->write || !is_virtual(request->fd))
		return;
	if (world.file.size > request->offset && world.file.size % world.file.block)
		memset(request->memory + from, 0, size); /* as ext4 does */
}

static void next_piece(struct request *request)
{
	uint64_t end = request->limit, most = size_of(request->fd), bad;

	if (!request->write && request->offset + end > most)
		end = most > request->offset ? most - request->offset : 0;
	if (request->passthrough && (request->status || end < request->length)) {
		request->ending = true; /* a command moves all or nothing */
		if (!request->status)
			request->status = 0x080;
		return;
	}
	if (request->lie != HONEST) {
		move_falsely(request, end);
		request->moved = end;
		request->ending = true;
		return;
	}
	if (end > request->moved + 512 && choose(2)) /* not all at once */
		end = request->moved + (1 + choose((end - request->moved) / 512)) * 512;
	if (end > request->limit)
		end = request->limit;
	bad = first_bad(request, end);
	if (end > request->moved)
		move(request, request->write, request->moved, request->moved, bad - request->moved);
	if (bad > request->moved)
		request->moved = bad;
	if (bad < end) {
		request->ending = true;
		request->error = -EIO; /* O_DIRECT never answers with the part before it */
		if (request->passthrough) {
			request->error = 0;
			request->status = request->write ? 0x280 : 0x281;
		}
		answered(-EIO);
	} else if (request->moved >= request->limit) {
		request->ending = true;
	} else if (!request->write && request->offset + request->moved >= most) {
		end_of_file(request);
	}
}

static void finish(struct request *request)
{
	struct virtual_file *file = &world.file;
	int64_t result = (int64_t)request->moved;

	if (request->pause)
		result = -ETIME;
	else if (request->error)
		result = request->error;
	else if (request->flush)
		result = 0;
	else if (request->passthrough)
		result = request->status;
	if (request->flush && !request->error && is_virtual(request->fd))
		write_out(request->offset,
			  request->length ? request->offset + request->length : FILE_MOST);
	if (request->direct && request->write && is_virtual(request->fd) &&
	    (!file->device || !request->ring))
		drop(request->offset, request->offset + request->length, true);
	happened("done", request->number, 0, (uint64_t)result);
	request_done(request, result);
	request_end(request);
}

/* -- time */

static struct request *first_request(void)
{
	struct request *first = NULL;

	for (unsigned i = 0; i < kernel.used; i++) {
		struct request *request = &kernel.requests[i];

		if (request->used && (!first || request->at < first->at))
			first = request;
	}
	return first;
}

static void happen(struct request *request)
{
	if (request->at > kernel.now)
		kernel.now = request->at;
	others();
	if (request->pause || request->flush || request->cancelled || request->ending) {
		finish(request);
		return;
	}
	next_piece(request);
	request->at = kernel.now + latency();
}

bool next_event(void)
{
	struct request *request = first_request();

	if (request)
		happen(request);
	return request;
}

bool event_until(uint64_t deadline)
{
	struct request *request = first_request();

	if (request && request->at <= deadline) {
		happen(request);
		return true;
	}
	if (deadline > kernel.now)
		kernel.now = deadline;
	return false;
}

void time_passes(uint64_t ns)
{
	uint64_t until = kernel.now + ns;

	while (event_until(until))
		;
}

int request_cancel(uint64_t user_data)
{
	for (unsigned i = 0; i < kernel.used; i++) {
		struct request *request = &kernel.requests[i];

		if (!request->used || request->user_data != user_data)
			continue;
		if (request->moved || request->ending || chance(500))
			return -EALREADY;
		request->cancelled = request->ending = true;
		request->error = -ECANCELED;
		request->status = 0;
		request->at = kernel.now + 1;
		return 0;
	}
	return -ENOENT;
}

/* -- synchronous calls */

static struct {
	bool done;
	int64_t result;
} synchronous;

void synchronous_done(int64_t result)
{
	synchronous.done = true;
	synchronous.result = result;
}

bool is_direct(int fd)
{
	if (is_virtual(fd))
		return fd == DIRECT_FD;
	return fd >= 0 && fcntl(fd, F_GETFL) & O_DIRECT;
}

static int64_t run_now(const struct request *what)
{
	struct request *request = request_new();
	uint64_t number = request->number;

	*request = *what;
	request->used = true;
	request->number = number;
	request_start(request);
	synchronous.done = false;
	while (!synchronous.done)
		if (!next_event())
			broken("a synchronous call that does not return");
	return synchronous.result;
}

int64_t transfer_now(bool write, int fd, uint8_t *memory, uint64_t length, uint64_t offset)
{
	int64_t result = run_now(&(struct request){
		.write = write,
		.fd = fd,
		.direct = is_direct(fd),
		.memory = memory,
		.offset = offset,
		.length = length,
	});

	if (write && result >= 0 && result < (int64_t)length)
		answered(-EIO); /* the core calls a short one an error */
	return result;
}

int64_t command_now(bool write, uint8_t *memory, uint64_t length, uint64_t offset)
{
	return run_now(&(struct request){
		.write = write,
		.fd = DIRECT_FD,
		.direct = true,
		.passthrough = true,
		.memory = memory,
		.offset = offset,
		.length = length,
	});
}

int flush_now(uint64_t offset, uint64_t size)
{
	return (int)run_now(
		&(struct request){.flush = true, .fd = PLAIN_FD, .offset = offset, .length = size});
}

void pages_drop(uint64_t start, uint64_t end)
{
	drop(start, end, false);
}

unsigned pages_count(uint64_t start, uint64_t end)
{
	unsigned count = 0;

	for (unsigned page = (unsigned)(start / VIRTUAL_PAGE); page < page_after(end); page++)
		count += world.file.pages[page] != ABSENT;
	return count;
}

void virtual_begin(uint64_t seed, const struct faults *faults)
{
	choices_from_seed(seed);
	world.faults = *faults;
	world.failing = true;
	world.truncated = UINT64_MAX;
	world.lies = world.waits = 0;
	kernel.numbers = 0;
	/* the core counts milliseconds, so each episode begins with a whole one */
	kernel.now = (kernel.now / 1000000000 + 1) * 1000000000;
}

uint32_t virtual_in_flight(uint64_t address, uint64_t size)
{
	uint32_t count = 0;

	for (unsigned i = 0; i < kernel.used; i++) {
		uint64_t start = (uintptr_t)kernel.requests[i].memory;

		if (kernel.requests[i].used)
			count += !size || (start < address + size &&
					   address < start + kernel.requests[i].length);
	}
	return count;
}
