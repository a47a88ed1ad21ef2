/* SPDX-License-Identifier: MIT */
/*
 * A GPU over host memory, for the stand-ins of vendors' libraries (libamdhip64.c, libze_loader.c):
 * its memory, pinned host memory, and copies that end when they are asked for. It notices what
 * would harm a device: memory that was unpinned, freed, changed or reused under a copy.
 *
 * Memory of the device is a memfd with GPU_LEAD bytes before it, as a driver may place several
 * allocations in one dma-buf. An exported descriptor cannot be mapped for writing, as of most
 * devices' memory.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { GPU_MOST = 64, GPU_LAG = 2, GPU_LEAD = GPU_LEAD_BYTES };
#define GPU_SEAL_FUTURE_WRITE 0x10

struct gpu_memory {
	char *start, *mapping;
	size_t size;
	int fd, imported, not_shared, mapped;
};

struct gpu_copy {
	void *to;
	const void *from, *host;
	void *before;
	size_t size;
	int to_device, ended, flying;
};

struct gpu_event {
	int used, copied; /* copied: the number of a copy and 1, 0 for the caller's stream */
};

static struct gpu_memory gpu_memories[GPU_MOST];
static struct {
	char *start;
	size_t size;
} gpu_pins[GPU_MOST];
static struct gpu_event gpu_events[GPU_MOST];
static struct gpu_copy *gpu_copies;
static int gpu_begun, gpu_oldest, gpu_asked, gpu_queues, gpu_contexts;
static size_t gpu_free_bytes = 16 << 20;
static char gpu_broken[256];

int fake_count = 1, fake_busy, fake_ordinal;

static void gpu_break(const char *what)
{
	if (!gpu_broken[0])
		snprintf(gpu_broken, sizeof(gpu_broken), "%s", what);
}

static int gpu_flying(void)
{
	return gpu_oldest < gpu_begun;
}

/* -- memory */

static struct gpu_memory *gpu_slot(void)
{
	for (int i = 0; i < GPU_MOST; i++) {
		if (!gpu_memories[i].start)
			return &gpu_memories[i];
	}
	abort();
}

static struct gpu_memory *gpu_find(const void *address)
{
	for (int i = 0; i < GPU_MOST; i++) {
		struct gpu_memory *one = &gpu_memories[i];

		if (one->start && (char *)address >= one->start &&
		    (char *)address < one->start + one->size)
			return one;
	}
	return NULL;
}

static void *gpu_alloc(size_t size)
{
	struct gpu_memory *made = gpu_slot();

	if (size > gpu_free_bytes)
		return NULL;
	made->fd = memfd_create("test GPU", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (ftruncate(made->fd, (off_t)(GPU_LEAD + size)))
		abort();
	made->mapping =
		mmap(NULL, GPU_LEAD + size, PROT_READ | PROT_WRITE, MAP_SHARED, made->fd, 0);
	fcntl(made->fd, F_ADD_SEALS, GPU_SEAL_FUTURE_WRITE);
	made->start = made->mapping + GPU_LEAD;
	made->size = size;
	made->imported = made->not_shared = 0;
	gpu_free_bytes -= size;
	return made->start;
}

static void *gpu_import(int fd, size_t size)
{
	struct gpu_memory *made = gpu_slot();
	int how = PROT_READ | PROT_WRITE;

	made->mapping = mmap(NULL, size, how, MAP_SHARED, fd, 0);
	if (made->mapping == MAP_FAILED)
		made->mapping = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
	if (made->mapping == MAP_FAILED)
		return NULL;
	made->start = made->mapping;
	made->size = size;
	made->fd = -1;
	made->imported = 1;
	made->mapped = 0;
	return made->start;
}

static int gpu_free(void *address)
{
	struct gpu_memory *one = gpu_find(address);

	if (!one || one->start != address)
		return -1;
	if (gpu_flying())
		gpu_break("device memory freed under a copy");
	munmap(one->mapping, one->size + (size_t)(one->start - one->mapping));
	if (one->fd >= 0) {
		close(one->fd);
		gpu_free_bytes += one->size;
	}
	one->start = NULL;
	return 0;
}

static int gpu_export(const void *address)
{
	struct gpu_memory *one = gpu_find(address);

	return one && !one->imported && !one->not_shared ? fcntl(one->fd, F_DUPFD, 3) : -1;
}

/* -- host memory */

static int gpu_pin(void *address, size_t size)
{
	for (int i = 0; i < GPU_MOST; i++) {
		if (gpu_pins[i].start == address)
			return -1;
	}
	for (int i = 0; i < GPU_MOST; i++) {
		if (!gpu_pins[i].start) {
			gpu_pins[i].start = address;
			gpu_pins[i].size = size;
			return 0;
		}
	}
	abort();
}

static int gpu_pinned(const void *address, size_t size)
{
	for (int i = 0; i < GPU_MOST; i++) {
		char *start = gpu_pins[i].start;

		if (start && (char *)address >= start &&
		    (char *)address + size <= start + gpu_pins[i].size)
			return i;
	}
	return -1;
}

static int gpu_unpin(void *address)
{
	int number = gpu_pinned(address, 1);

	if (number < 0 || gpu_pins[number].start != address)
		return -1;
	for (int i = gpu_oldest; i < gpu_begun; i++) {
		if (gpu_pinned(gpu_copies[i].host, 1) == number)
			gpu_break("unpinned under a copy");
	}
	gpu_pins[number].start = NULL;
	return 0;
}

/* -- copies and events */

static void gpu_step(void)
{
	struct gpu_copy *copy = gpu_copies + gpu_oldest;

	if (!gpu_flying() || ++gpu_asked < GPU_LAG)
		return;
	gpu_asked = 0;
	gpu_oldest++;
	if (memcmp(copy->host, copy->before, copy->size))
		gpu_break("a block changed under its copy");
	memcpy(copy->to, copy->to_device ? copy->before : copy->from, copy->size);
	free(copy->before);
	copy->ended = 1;
}

static int gpu_copy(void *to, const void *from, size_t size, struct gpu_event *event)
{
	int to_device = gpu_find(to) != NULL;
	const void *host = to_device ? from : to;
	struct gpu_copy *copy;

	if (!gpu_find(to_device ? to : from))
		return -1;
	if (gpu_pinned(host, size) < 0)
		gpu_break("a copy of memory that is not pinned");
	for (int i = gpu_oldest; i < gpu_begun; i++) {
		if (gpu_copies[i].host == host)
			gpu_break("two copies of one block");
	}
	gpu_copies = realloc(gpu_copies, sizeof(*copy) * (size_t)(gpu_begun + 1));
	copy = gpu_copies + gpu_begun++;
	*copy = (struct gpu_copy){to, from, host, malloc(size), size, to_device, 0, 1};
	memcpy(copy->before, host, size);
	if (event)
		event->copied = gpu_begun;
	return 0;
}

static int gpu_idle(void)
{
	gpu_step();
	return !gpu_flying();
}

static struct gpu_event *gpu_new_event(void)
{
	for (int i = 0; i < GPU_MOST; i++) {
		if (!gpu_events[i].used) {
			gpu_events[i] = (struct gpu_event){1, 0};
			return &gpu_events[i];
		}
	}
	abort();
}

static int gpu_caller_ready(void)
{
	return !fake_busy || !fake_busy--;
}

static int gpu_occurred(struct gpu_event *event)
{
	if (!event->copied)
		return gpu_caller_ready();
	if (!gpu_copies[event->copied - 1].ended)
		gpu_step();
	return gpu_copies[event->copied - 1].ended;
}

/* -- for the tests */

const char *fake_broken(void)
{
	if (gpu_flying())
		gpu_break("a copy is in flight");
	return gpu_broken;
}

const char *fake_left(void)
{
	static char text[256];
	int memory = 0, pins = 0, events = 0;

	for (int i = 0; i < GPU_MOST; i++) {
		memory += gpu_memories[i].start != NULL;
		pins += gpu_pins[i].start != NULL;
		events += gpu_events[i].used;
	}
	snprintf(text, sizeof(text), "%d memory, %d pinned, %d events, %d queues, %d contexts",
		 memory, pins, events, gpu_queues, gpu_contexts);
	return text;
}

static struct gpu_event gpu_marked[GPU_MOST];
static int gpu_marked_queues;

/* Note which events there are, and forget those made since. */
void fake_mark(void)
{
	memcpy(gpu_marked, gpu_events, sizeof(gpu_events));
	gpu_marked_queues = gpu_queues;
}

void fake_forget_events(void)
{
	for (int i = 0; i < GPU_MOST; i++)
		gpu_events[i].used = gpu_events[i].used && gpu_marked[i].used;
	gpu_queues = gpu_marked_queues;
}

/* Forget what a test left on purpose. */
void fake_reset(void)
{
	for (int i = 0; i < GPU_MOST; i++) {
		if (gpu_memories[i].start)
			gpu_free(gpu_memories[i].start);
		gpu_pins[i].start = NULL;
		gpu_events[i].used = 0;
	}
	while (gpu_oldest < gpu_begun)
		free(gpu_copies[gpu_oldest++].before);
	gpu_queues = gpu_contexts = gpu_asked = gpu_begun = gpu_oldest = 0;
	gpu_broken[0] = 0;
	fake_count = 1;
	fake_busy = fake_ordinal = 0;
}
