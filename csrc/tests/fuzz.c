/* SPDX-License-Identifier: MIT */
/* Episodes whose choices libFuzzer makes: two bytes of input for each, then the least harmful ones.
 */
#include <stddef.h>

#include "simulator/episode.h"
#include "simulator/virtual.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	choices_from_bytes(data, size);
	episode();
	return 0;
}
