/* SPDX-License-Identifier: MIT */
/*
 * Staging blocks. Shared anonymous memory, since a private page that a device writes to while
 * another thread forks may end up in the wrong process (open(2), NOTES on O_DIRECT).
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "internal.h"

static int map_memory(struct dmb_stage *stage, size_t size)
{
	void *memory;

	dmb_stage_release(stage);
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return -errno;
	stage->memory = memory;
	stage->size = size;
	return 0;
}

int dmb_stage_reserve(struct dmb_stage *stage, uint32_t count, size_t block)
{
	int rc = 0;

	if (block > SIZE_MAX / count)
		return -ENOMEM;
	if (stage->size < count * block)
		rc = map_memory(stage, count * block);
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
