/* SPDX-License-Identifier: MIT */
/* The thread backend by itself: start, stop, cancel. Under ThreadSanitizer too. */
#include "test.h"

#include <pthread.h>

enum { REQUESTS = 64, LENGTH = 4 * PAGE };

static struct file file;

static void start_and_stop(void)
{
	for (unsigned depth = 0; depth < 40; depth++) {
		struct dmb_ring *ring;

		context("start and stop", depth);
		CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_THREADS, depth, 0, &ring), 0);
		dmb_ring_destroy(ring);
	}
	dmb_ring_destroy(NULL);
}

/* The first half, the last of which is taken back at once, and the second. */
static void issue_all(struct dmb_ring *ring, struct dmb_io *ios, uint8_t *bytes)
{
	for (size_t i = 0; i < REQUESTS; i++) {
		if (i == REQUESTS / 2)
			ring->ops->cancel(ring, &ios[i - 1]);
		ios[i] = (struct dmb_io){
			.direction = DMB_READ,
			.fd = file.plain,
			.file_slot = -1,
			.buffer_slot = -1,
			.address = bytes + i * LENGTH,
			.length = LENGTH,
			.offset = i * LENGTH,
		};
		CHECK_EQUAL(ring->ops->issue(ring, &ios[i]), 0);
	}
}

/* Each request completes once, run or cancelled; a cancelled one did not touch its memory. */
static void cancel(unsigned depth, unsigned round)
{
	size_t size = (size_t)REQUESTS * LENGTH, reaped = 0, cancelled = 0;
	struct dmb_io ios[REQUESTS], *io;
	uint8_t *bytes = malloc(size);
	struct dmb_ring *ring;

	context("cancel", round);
	CHECK(bytes);
	memset(bytes, POISON, size);
	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_THREADS, depth, 0, &ring), 0);
	issue_all(ring, ios, bytes);
	for (uint64_t left = random_below(4); left; left--)
		CHECK_EQUAL(ring->ops->wait(ring, 1000), 0);
	for (size_t i = 0; i < REQUESTS; i++) /* the middle, the ends, and twice */
		ring->ops->cancel(ring, &ios[(i * 37 + round) % REQUESTS]);
	for (size_t i = 0; i < REQUESTS; i += 2)
		ring->ops->cancel(ring, &ios[i]);
	while (reaped < REQUESTS) {
		CHECK_EQUAL(ring->ops->wait(ring, 1000), 0);
		for (; (io = ring->ops->reap(ring)); reaped++) {
			uint8_t poison[16];

			if (io->result == LENGTH) {
				CHECK_EQUAL(memcmp(io->address, file.bytes + io->offset, LENGTH),
					    0);
				continue;
			}
			CHECK_EQUAL(io->result, -ECANCELED);
			memset(poison, POISON, sizeof(poison));
			CHECK_EQUAL(memcmp(io->address, poison, sizeof(poison)), 0);
			cancelled++;
		}
	}
	if (!depth)
		CHECK(cancelled >= REQUESTS - 3);
	CHECK(!ring->ops->reap(ring));
	dmb_ring_destroy(ring);
	free(bytes);
}

/* Who waits sleeps until the workers have next to nothing left: one request less than they are. */
static void wakes(unsigned workers, unsigned round)
{
	uint8_t *bytes = malloc((size_t)REQUESTS * LENGTH);
	unsigned reaped = 0, busy = 2 * workers - 1;
	struct dmb_io ios[REQUESTS];
	struct dmb_ring *ring;

	context("wakes", round);
	CHECK(bytes);
	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_THREADS, workers, 0, &ring), 0);
	issue_all(ring, ios, bytes);
	CHECK_EQUAL(ring->ops->wait(ring, 60000), 0);
	while (ring->ops->reap(ring))
		reaped++;
	CHECK(reaped >= REQUESTS - busy);
	while (reaped < REQUESTS) {
		CHECK_EQUAL(ring->ops->wait(ring, 60000), 0);
		while (ring->ops->reap(ring))
			reaped++;
	}
	dmb_ring_destroy(ring);
	free(bytes);
}

/* A ring that goes away right after its batch. */
static void *drain_and_destroy(void *arg)
{
	(void)arg;
	for (unsigned round = 0; round < 60; round++) {
		uint64_t segment[3] = {1, 2, file.size - 100};
		struct dmb_batch *batch;
		struct memory memory;
		struct dmb_ring *ring;
		struct dmb_job job = {
			.fd = file.plain,
			.file_slot = -1,
			.plain_fd = -1,
			.offset_align = 1,
			.memory_align = 1,
			.page = PAGE,
			.file_size = file.size,
			.size = file.size,
			.direction = DMB_READ,
			.route = DMB_BUFFERED,
			.depth = 16,
			.block = PAGE,
		};

		memory_map(&memory, file.size);
		job.base = (uintptr_t)memory.bytes;
		CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_THREADS, round % 5, 0, &ring), 0);
		CHECK_EQUAL(dmb_batch_create(ring, &job, segment, 1, &batch), 0);
		for (unsigned i = 0; i < round % 4; i++)
			CHECK(dmb_batch_run(batch, 0) >= 0);
		dmb_batch_destroy(batch);
		dmb_ring_destroy(ring);
		memory_unmap(&memory);
	}
	return NULL;
}

int main(void)
{
	pthread_t others[2];

	if (!file_open(&file, (uint64_t)REQUESTS * LENGTH))
		return finish();
	start_and_stop();
	for (unsigned round = 0; round < 60; round++)
		cancel(round % 4, round);
	for (unsigned round = 0; round < 60; round++)
		wakes(1 + round % 4, round);
	context("drain and destroy", 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQUAL(pthread_create(&others[i], NULL, drain_and_destroy, NULL), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQUAL(pthread_join(others[i], NULL), 0);
	file_close(&file);
	return finish();
}
