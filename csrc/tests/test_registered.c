/* SPDX-License-Identifier: MIT */
/* Registered buffers and files: used, straddled, cleared under a batch, and a table's end. */
#include "test.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

enum {
	FILE_SIZE = 150000,
	MEMORY = 32 * PAGE,
	SLOT = 4 * PAGE,
	SLOTS = MEMORY / SLOT,
	ROUNDS = 24
};

static struct file file;
static struct memory memory;
static int32_t slots[SLOTS];

static void register_slots(struct dmb_ring *ring, int32_t first)
{
	for (int32_t i = 0; i < SLOTS; i++) {
		slots[i] = i % 4 == 3 ? -1 : first + i;
		if (slots[i] < 0)
			continue;
		CHECK_EQUAL(dmb_ring_register_buffer(ring, (unsigned)slots[i],
						     (uintptr_t)memory.bytes + (uint64_t)i * SLOT,
						     SLOT),
			    0);
	}
}

static void clear_slots(struct dmb_ring *ring)
{
	for (int32_t i = 0; i < SLOTS; i++)
		if (slots[i] >= 0)
			CHECK_EQUAL(dmb_ring_register_buffer(ring, (unsigned)slots[i], 0, 0), 0);
}

static void prepare(struct dmb_job *job, uint64_t *segments, int direction, int route)
{
	*job = make_job(&file, &memory, direction, route);
	job->slots = slots;
	job->slot_size = SLOT;
	random_segments(segments, 4, file.size, memory.size, direction);
	random_bytes(memory.bytes, memory.size);
	if (direction == DMB_READ)
		memset(memory.bytes, POISON, memory.size);
}

static void transfers(struct dmb_ring *ring)
{
	register_slots(ring, 100);
	CHECK_EQUAL(dmb_ring_register_file(ring, 7, file.direct), 0);
	CHECK_EQUAL(dmb_ring_register_file(ring, 8, file.plain), 0);
	for (unsigned round = 0; round < ROUNDS; round++) {
		int direction = round & 1, route = DMB_DIRECT + (int)(round % 3);
		struct dmb_result result;
		uint64_t segments[12];
		struct dmb_job job;

		context("registered", round);
		prepare(&job, segments, direction, route);
		job.file_slot = route == DMB_BUFFERED ? 8 : 7;
		if (direction == DMB_READ)
			job.fd = -1; /* the slot alone will do */
		result = transfer(ring, &job, segments, 4);
		CHECK_EQUAL(result.error, 0);
		check_moved(&file, &memory, segments, 4, direction, result.nbytes, false);
	}
	clear_slots(ring);
	CHECK_EQUAL(dmb_ring_register_file(ring, 7, -1), 0);
	CHECK_EQUAL(dmb_ring_register_file(ring, 8, -1), 0);
}

/* The slot is what counts: one that covers other memory fails, and says that it went straight. */
static void wrong_slot(struct dmb_ring *ring)
{
	uint64_t segments[12] = {0, 0, SLOT};
	struct dmb_result result;
	struct dmb_job job;

	context("wrong slot", 0);
	register_slots(ring, 200);
	prepare(&job, segments, DMB_READ, DMB_DIRECT);
	memcpy(segments, (uint64_t[3]){0, 0, SLOT}, 24);
	slots[0]++;
	result = transfer(ring, &job, segments, 1);
	slots[0]--;
	CHECK_EQUAL(result.error, EFAULT);
	CHECK_EQUAL(result.failed_straight, 1);
	CHECK_EQUAL(result.nbytes, 0);
	clear_slots(ring);
}

/* Without a slot an offset into a dma-buf must not be taken for an address. */
static void no_slot(struct dmb_ring *ring)
{
	const uint64_t segment[3] = {0, (uintptr_t)memory.bytes, SLOT};
	int32_t none = -1;

	for (int direction = DMB_READ; direction <= DMB_WRITE; direction++) {
		struct dmb_job job = make_job(&file, &memory, direction, DMB_NATIVE);
		struct dmb_result result;

		context("no slot", (unsigned)direction);
		random_bytes(memory.bytes, memory.size);
		memset(memory.bytes, POISON, SLOT);
		job.base = 0;
		job.size = UINT64_MAX;
		job.slots = &none;
		job.slot_size = 1ULL << 62;
		result = transfer(ring, &job, segment, 1);
		CHECK_EQUAL(result.error, EFAULT);
		CHECK_EQUAL(result.nbytes, 0);
		for (unsigned i = 0; i < SLOT; i++)
			CHECK_EQUAL(memory.bytes[i], POISON);
		file_check(&file);
	}
}

/* Cleared while requests are in flight: those finish, later ones fail cleanly. */
static void clearing(struct dmb_ring *ring)
{
	for (unsigned round = 0; round < ROUNDS; round++) {
		struct dmb_result result;
		struct dmb_batch *batch;
		uint64_t segments[12];
		struct dmb_job job;
		int rc = 1;

		context("clearing", round);
		register_slots(ring, 300);
		prepare(&job, segments, round & 1, DMB_DIRECT);
		job.block = PAGE;
		CHECK_EQUAL(dmb_batch_create(ring, &job, segments, 4, &batch), 0);
		for (uint64_t left = random_below(10); left && rc == 1; left--)
			rc = dmb_batch_run(batch, 0);
		clear_slots(ring);
		while (rc == 1)
			rc = dmb_batch_run(batch, 100);
		CHECK_EQUAL(rc, 0);
		dmb_batch_get_result(batch, &result);
		CHECK(result.error == 0 || result.error == EFAULT);
		if (result.error)
			CHECK_EQUAL(result.failed_straight, 1);
		dmb_batch_destroy(batch);
		check_moved(&file, &memory, segments, 4, round & 1, result.nbytes, false);
	}
}

static atomic_bool stop;

static void *register_often(void *ring)
{
	while (!stop) {
		uint64_t address = (uintptr_t)memory.bytes;

		CHECK_EQUAL(dmb_ring_register_buffer(ring, 1000, address, SLOT), 0);
		CHECK_EQUAL(dmb_ring_register_file(ring, 100, file.direct), 0);
		CHECK_EQUAL(dmb_ring_register_buffer(ring, 1000, 0, 0), 0);
		CHECK_EQUAL(dmb_ring_register_file(ring, 100, -1), 0);
	}
	return NULL;
}

/* Another thread registers beside a running batch. */
static void beside(struct dmb_ring *ring)
{
	pthread_t other;

	stop = false;
	CHECK_EQUAL(pthread_create(&other, NULL, register_often, ring), 0);
	transfers(ring);
	stop = true;
	CHECK_EQUAL(pthread_join(other, NULL), 0);
}

static void table(struct dmb_ring *ring)
{
	uint64_t address = (uintptr_t)memory.bytes;

	context("tables", 0);
	for (unsigned slot = 0; slot < DMB_BUFFER_SLOTS; slot++)
		CHECK_EQUAL(dmb_ring_register_buffer(ring, slot, address, PAGE), 0);
	CHECK(dmb_ring_register_buffer(ring, DMB_BUFFER_SLOTS, address, PAGE) < 0);
	CHECK_EQUAL(dmb_ring_register_buffer(ring, 5, address + PAGE, PAGE), 0);
	for (unsigned slot = 0; slot < DMB_BUFFER_SLOTS; slot++)
		CHECK_EQUAL(dmb_ring_register_buffer(ring, slot, 0, 0), 0);
	CHECK_EQUAL(dmb_ring_register_buffer(ring, 0, 0, 0), 0); /* empty already */
	CHECK_EQUAL(dmb_ring_register_buffer(ring, 0, address - PAGE, PAGE), -EFAULT);
	for (unsigned slot = 0; slot < DMB_FILE_SLOTS; slot++)
		CHECK_EQUAL(dmb_ring_register_file(ring, slot, file.plain), 0);
	CHECK(dmb_ring_register_file(ring, DMB_FILE_SLOTS, file.plain) < 0);
	CHECK_EQUAL(dmb_ring_register_file(ring, 3, -1), 0);
	CHECK_EQUAL(dmb_ring_register_file(ring, 3, -1), 0);
	CHECK_EQUAL(dmb_ring_register_file(ring, 3, 100000), -EBADF);
	for (unsigned slot = 0; slot < DMB_FILE_SLOTS; slot++)
		CHECK_EQUAL(dmb_ring_register_file(ring, slot, -1), 0);
}

static void test(struct dmb_ring *ring)
{
	struct dmb_ring_info info;

	dmb_ring_get_info(ring, &info);
	if (info.backend == DMB_BACKEND_THREADS) {
		CHECK_EQUAL(dmb_ring_register_buffer(ring, 0, 0, 0), -EOPNOTSUPP);
		CHECK_EQUAL(dmb_ring_register_file(ring, 0, -1), -EOPNOTSUPP);
		return;
	}
	CHECK_EQUAL(info.buffer_table, 0);
	CHECK_EQUAL(info.file_table, 0);
	if (!file_open(&file, FILE_SIZE))
		return;
	memory_map(&memory, MEMORY);
	transfers(ring);
	wrong_slot(ring);
	no_slot(ring);
	clearing(ring);
	table(ring);
	if (!(info.setup_flags & IORING_SETUP_SINGLE_ISSUER))
		beside(ring);
	memory_unmap(&memory);
	file_close(&file);
}

int main(void)
{
	on_each_ring(test);
	return finish();
}
