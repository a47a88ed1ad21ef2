/* SPDX-License-Identifier: MIT */
/*
 * Staging blocks. They are shared anonymous memory, because a private page that a device writes to
 * while another thread forks may end up in the wrong process (open(2), NOTES on O_DIRECT). Huge
 * pages make a block one piece of memory to the device.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "internal.h"

#define LARGEST (16UL << 20) /* the largest pool in huge pages, which are filled at once */

/* Reserve address space that begins at a multiple of a huge page; NULL on failure. */
static void *find_room(size_t size, size_t huge)
{
	uint8_t *room, *start;

	room = mmap(NULL, size + huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (room == MAP_FAILED)
		return NULL;
	start = (uint8_t *)(uintptr_t)dmb_align_up((uintptr_t)room, huge);
	if (start > room)
		munmap(room, (size_t)(start - room));
	munmap(start + size, (size_t)(room + huge - start));
	return start;
}

static int map_memory(struct dmb_stage *stage, size_t size, bool large)
{
	const size_t huge = dmb_huge_page();
	void *memory, *room = NULL;

	dmb_stage_release(stage);
	if (large && size && size % huge == 0 && size <= LARGEST)
		room = find_room(size, huge);
	memory = mmap(room, size, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS | (room ? MAP_FIXED : 0), -1, 0);
	if (memory == MAP_FAILED) {
		int rc = -errno;

		if (room)
			munmap(room, size);
		return rc;
	}
	if (room)
		dmb_collapse((uintptr_t)memory, size); /* on failure, keep ordinary pages */
	stage->memory = memory;
	stage->size = size;
	return 0;
}

int dmb_stage_reserve(struct dmb_stage *stage, uint32_t count, size_t block, bool large)
{
	int rc = 0;

	if (block > SIZE_MAX / count)
		return -ENOMEM;
	if (stage->size < count * block)
		rc = map_memory(stage, count * block, large);
	free(stage->free);
	stage->free = rc ? NULL : malloc(count * sizeof(*stage->free));
	if (!stage->free) {
		dmb_stage_release(stage);
		return rc ? rc : -ENOMEM;
	}
	for (uint32_t i = 0; i < count; i++)
		stage->free[i] = count - 1 - i;
	stage->block = block;
	stage->count = stage->free_count = count;
	return 0;
}

void dmb_stage_release(struct dmb_stage *stage)
{
	if (stage->memory)
		munmap(stage->memory, stage->size);
	free(stage->free);
	*stage = (struct dmb_stage){0};
}

uint8_t *dmb_stage_take(struct dmb_stage *stage)
{
	if (!stage->free_count)
		return NULL;
	return stage->memory + stage->free[--stage->free_count] * stage->block;
}

void dmb_stage_give(struct dmb_stage *stage, uint8_t *block)
{
	stage->free[stage->free_count++] =
		(uint32_t)((size_t)(block - stage->memory) / stage->block);
}
