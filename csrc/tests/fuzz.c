/* SPDX-License-Identifier: MIT */
/* Episodes whose choices libFuzzer makes: two bytes of input for each, then the least harmful ones.
 */
#include <stddef.h>

#include "simulator/episode.h"
#include "simulator/virtual.h"

enum { MOST = 4096 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint32_t choices[MOST];
	size_t count = size / 2 < MOST ? size / 2 : MOST;

	for (size_t i = 0; i < count; i++)
		choices[i] = (uint32_t)data[2 * i] << 8 | data[2 * i + 1];
	choices_replay(choices, count);
	episode();
	return 0;
}
