/* SPDX-License-Identifier: MIT */
/* The choices that decide everything, and the record of what happened. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "virtual.h"

enum { CHOICES = 1 << 20 };

/* -- decisions */

static uint32_t made[CHOICES];
static uint64_t past; /* the hash of what happened */

static struct {
	uint64_t state;
	bool replaying;
	size_t count, given;
} dice;

uint64_t choose(uint64_t limit)
{
	uint64_t value = 0;

	if (limit < 2)
		return 0;
	if (dice.count == CHOICES)
		broken("an episode that does not end");
	if (!dice.replaying) { /* xorshift64* */
		dice.state ^= dice.state >> 12;
		dice.state ^= dice.state << 25;
		dice.state ^= dice.state >> 27;
		value = (dice.state * 0x2545f4914f6cdd1d >> 11) % limit;
	} else if (dice.count < dice.given) {
		value = made[dice.count] % limit;
	}
	made[dice.count++] = (uint32_t)value;
	return value;
}

bool chance(unsigned per_mille)
{
	return per_mille && choose(1000) + per_mille >= 1000;
}

void choices_from_seed(uint64_t seed)
{
	/* splitmix64, so that seeds beside each other have nothing in common */
	seed += 0x9e3779b97f4a7c15;
	seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9;
	seed = (seed ^ seed >> 27) * 0x94d049bb133111eb;
	dice.state = (seed ^ seed >> 31) | 1;
	dice.replaying = false;
	dice.count = 0;
	past = 0;
}

void choices_replay(const uint32_t *choices, size_t count)
{
	memmove(made, choices, count * sizeof(*choices));
	dice.replaying = true;
	dice.given = count;
	dice.count = 0;
	past = 0;
}

void choices_from_bytes(const uint8_t *data, size_t size)
{
	dice.given = size / 2 < CHOICES ? size / 2 : CHOICES;
	for (size_t i = 0; i < dice.given; i++)
		made[i] = (uint32_t)data[2 * i] << 8 | data[2 * i + 1];
	dice.replaying = true;
	dice.count = 0;
	past = 0;
}

const uint32_t *choices_made(size_t *count)
{
	*count = dice.count;
	return made;
}

/* -- what happened */

static void abort_on(const char *format)
{
	(void)format;
	abort();
}

void (*on_broken)(const char *format) = abort_on;
void happened(const char *what, uint64_t a, uint64_t b, uint64_t c)
{
	const uint64_t values[] = {(uint64_t)what[0] << 8 | (uint64_t)what[1], a, b, c};

	for (unsigned i = 0; i < 4; i++)
		past = (past ^ values[i]) * 0x9e3779b97f4a7c15 ^ past >> 29;
	if (world.loud)
		printf("%10.3f us  %-22s %8llu %8llu %8lld\n", (double)now_ns() / 1000, what,
		       (unsigned long long)a, (unsigned long long)b, (long long)c);
}

uint64_t history(void)
{
	return past;
}

_Noreturn void broken(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf("\n");
	fflush(stdout);
	on_broken(format);
	abort();
}
