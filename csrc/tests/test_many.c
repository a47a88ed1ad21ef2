/* SPDX-License-Identifier: MIT */
/*
 * Many threads on two rings, as the Python engine has them: whoever runs a job holds the ring's
 * lock, and others register, clear and renew slots beside it. Each thread has files, memory and a
 * part of a memory that all share, and compares every byte.
 */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "test.h"
#include "watch.h"

enum {
	THREADS = 6,
	ROUNDS = 24,
	DEPTH = 8,
	SIZE = 24 * PAGE,
	SLOT = 8 * PAGE,
	SLOTS = SIZE / SLOT,
	FLIGHTS = 4,
};

/* -- rings that threads share */

struct shared {
	struct dmb_ring *ring;
	pthread_mutex_t lock;	/* of whoever runs a job on it */
	pthread_mutex_t tables; /* of the free slots */
	unsigned next_slot;
};

static struct shared rings[RINGS];
static bool native; /* emulated, and memory is a memfd's */
static bool uring_backend;
static atomic_bool stop;

static unsigned take_slots(struct shared *shared, unsigned count)
{
	unsigned first;

	pthread_mutex_lock(&shared->tables);
	first = shared->next_slot;
	shared->next_slot = (first + count) % (DMB_BUFFER_SLOTS - THREADS * SLOTS);
	pthread_mutex_unlock(&shared->tables);
	return first;
}

/* -- one thread's work */

struct one {
	unsigned number;
	unsigned dice; /* of its own: the tests' common one is no thread's */
	struct file file;
	struct memory memory;
	int memfd;
	int32_t slots[SLOTS];
};

static unsigned below(struct one *one, unsigned limit)
{
	return (unsigned)rand_r(&one->dice) % limit;
}

static void begin(struct one *one, unsigned number)
{
	one->number = number;
	one->dice = number + 1;
	CHECK(file_open(&one->file, SIZE));
	memory_map(&one->memory, SIZE);
	one->memfd = memfd_create("dmabuf-test", MFD_CLOEXEC);
	CHECK(one->memfd >= 0);
	CHECK_EQUAL(ftruncate(one->memfd, SIZE), 0);
	CHECK(mmap(one->memory.bytes, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		   one->memfd, 0) != MAP_FAILED);
}

static void end(struct one *one)
{
	file_check(&one->file);
	memory_unmap(&one->memory);
	file_close(&one->file);
	close(one->memfd);
}

static int enter(struct shared *shared, struct one *one, unsigned slot, unsigned index)
{
	uint64_t address = (uintptr_t)one->memory.bytes + (uint64_t)index * SLOT;

	if (native)
		return dmb_ring_register_dmabuf(shared->ring, slot, one->memfd, one->file.direct);
	return dmb_ring_register_buffer(shared->ring, slot, address, SLOT);
}

static void leave(struct shared *shared, unsigned slot)
{
	if (native)
		CHECK_EQUAL(dmb_ring_register_dmabuf(shared->ring, slot, -1, -1), 0);
	else
		CHECK_EQUAL(dmb_ring_register_buffer(shared->ring, slot, 0, 0), 0);
}

static bool use_slots(struct shared *shared, struct one *one, int route)
{
	unsigned first, count = native ? 1 : SLOTS;

	if (route != DMB_NATIVE && (!uring_backend || route != DMB_DIRECT || below(one, 2)))
		return false;
	first = take_slots(shared, SLOTS);
	for (unsigned i = 0; i < count; i++) {
		one->slots[i] = (int32_t)(first + i);
		CHECK_EQUAL(enter(shared, one, first + i, i), 0);
	}
	return true;
}

static void change(struct one *one, uint8_t *bytes)
{
	uint8_t by = (uint8_t)(1 + below(one, 255));

	for (unsigned i = 0; i < SIZE; i++)
		bytes[i] = (uint8_t)(bytes[i] * 5 + by + i / 512);
}

static struct dmb_job prepare(struct one *one, int direction, int route)
{
	bool plain = route == DMB_BUFFERED;

	if (direction == DMB_WRITE)
		change(one, one->memory.bytes);
	else
		memset(one->memory.bytes, POISON, SIZE);
	return (struct dmb_job){
		.fd = plain ? one->file.plain : one->file.direct,
		.file_slot = -1,
		.edge_fd = !plain && direction == DMB_WRITE ? one->file.plain : -1,
		.offset_align = plain ? 1 : one->file.offset_align,
		.memory_align = plain ? 1 : one->file.memory_align,
		.page = PAGE,
		.file_size = SIZE,
		.base = (uintptr_t)one->memory.bytes,
		.size = SIZE,
		.direction = direction,
		.route = route,
		.depth = 1 + below(one, DEPTH),
		.block = PAGE << below(one, 3),
	};
}

/* `nbytes` moved from `skip` on, which both sides have in the same place; what follows may have. */
static void check(struct one *one, int direction, uint64_t skip, uint64_t nbytes)
{
	static _Thread_local uint8_t now[SIZE];

	if (direction == DMB_READ) {
		CHECK(!memcmp(one->memory.bytes + skip, one->file.bytes + skip, nbytes));
		for (uint64_t i = 0; i < SIZE; i++)
			CHECK(one->memory.bytes[i] == one->file.bytes[i] ||
			      one->memory.bytes[i] == POISON);
		return;
	}
	CHECK_EQUAL(pread(one->file.plain, now, SIZE, 0), SIZE);
	CHECK(!memcmp(now + skip, one->memory.bytes + skip, nbytes));
	for (uint64_t i = 0; i < SIZE; i++)
		CHECK(now[i] == one->memory.bytes[i] || now[i] == one->file.bytes[i]);
	memcpy(one->file.bytes, now, SIZE);
}

static int some_route(struct one *one)
{
	return native ? DMB_NATIVE : DMB_DIRECT + (int)below(one, 3);
}

static void round_of(struct one *one)
{
	struct shared *shared = &rings[below(one, RINGS)];
	int direction = (int)below(one, 2), route = some_route(one), rc = 1;
	uint64_t skip = below(one, 2) ? below(one, 3 * PAGE) : 0;
	uint64_t segment[3] = {skip, skip, SIZE - skip};
	struct dmb_job job = prepare(one, direction, route);
	bool with_slots = use_slots(shared, one, route), interrupt = !below(one, 4);
	struct dmb_result result;
	struct dmb_batch *batch;

	job.slots = with_slots ? one->slots : NULL;
	job.slot_size = native ? SIZE : SLOT;
	pthread_mutex_lock(&shared->lock);
	CHECK_EQUAL(dmb_batch_create(shared->ring, &job, segment, 1, &batch), 0);
	for (unsigned left = interrupt ? below(one, 4) : 1000; left && rc == 1; left--)
		rc = dmb_batch_run(batch, interrupt ? 0 : 100);
	dmb_batch_drain(batch); /* at times before it is done: an interrupt */
	dmb_batch_get_result(batch, &result);
	dmb_batch_destroy(batch);
	pthread_mutex_unlock(&shared->lock);
	CHECK_EQUAL(result.error, 0);
	if (rc == 0)
		CHECK_EQUAL(result.nbytes, SIZE - skip);
	check(one, direction, skip, result.nbytes);
	if (with_slots)
		for (unsigned i = 0; i < (native ? 1 : SLOTS); i++)
			leave(shared, (unsigned)one->slots[i]);
}

static void *work(void *arg)
{
	struct one *one = arg;

	for (unsigned round = 0; round < ROUNDS; round++)
		round_of(one);
	return NULL;
}

/* What other buffers and files come and go beside running jobs, and a controller's reset does. */
static void *register_beside(void *arg)
{
	struct one *one = arg;

	while (!stop) {
		for (unsigned i = 0; i < RINGS; i++) {
			unsigned slot = DMB_BUFFER_SLOTS - 1 - one->number;

			if (!native && !uring_backend)
				return NULL;
			CHECK_EQUAL(enter(&rings[i], one, slot, 0), 0);
			CHECK_EQUAL(enter(&rings[i], one, slot, 0), 0); /* again, in place */
			if (uring_backend) {
				CHECK_EQUAL(dmb_ring_register_file(rings[i].ring, one->number,
								   one->file.direct),
					    0);
				CHECK_EQUAL(dmb_ring_register_file(rings[i].ring, one->number, -1),
					    0);
			}
			leave(&rings[i], slot);
		}
	}
	return NULL;
}

static void many(void)
{
	struct one ones[THREADS + 2];
	pthread_t threads[THREADS + 2];

	stop = false;
	for (unsigned i = 0; i < THREADS + 2; i++) {
		begin(&ones[i], i);
		CHECK_EQUAL(pthread_create(&threads[i], NULL, i < THREADS ? work : register_beside,
					   &ones[i]),
			    0);
	}
	for (unsigned i = 0; i < THREADS + 2; i++) {
		if (i == THREADS)
			stop = true;
		CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
		end(&ones[i]);
	}
}

/* -- event loops, each with a ring of its own, and calls in other threads that wake them */

struct loop {
	struct one ones[FLIGHTS];
	int backend;
	unsigned flags;
	int eventfd;
};

static void *nudge(void *arg)
{
	struct loop *loop = arg;

	while (!stop)
		eventfd_write(loop->eventfd, 1), usleep(100);
	return NULL;
}

struct flight {
	struct dmb_batch *batch;
	struct dmb_job job;
	uint64_t segment[3];
	unsigned rounds;
	bool stopped;
};

static void take_off(struct dmb_ring *ring, struct loop *loop, struct flight *flight, uint64_t tag)
{
	struct one *one = &loop->ones[tag];

	flight->job = prepare(one, (int)below(one, 2), some_route(one));
	flight->segment[0] = flight->segment[1] = below(one, 2) ? below(one, PAGE) : 0;
	flight->segment[2] = SIZE - flight->segment[0];
	flight->stopped = false;
	CHECK_EQUAL(dmb_batch_create(ring, &flight->job, flight->segment, 1, &flight->batch), 0);
	dmb_batch_start(flight->batch, tag);
	if (!below(one, 5)) {
		dmb_batch_stop(flight->batch);
		flight->stopped = true;
	}
}

static void land(struct loop *loop, struct flight *flight, uint64_t tag)
{
	struct dmb_result result;

	dmb_batch_get_result(flight->batch, &result);
	dmb_batch_destroy(flight->batch);
	flight->batch = NULL;
	CHECK_EQUAL(result.error, 0);
	if (!flight->stopped)
		CHECK_EQUAL(result.nbytes, flight->segment[2]);
	check(&loop->ones[tag], flight->job.direction, flight->segment[0], result.nbytes);
}

static void *drive(void *arg)
{
	struct loop *loop = arg;
	struct flight flights[FLIGHTS] = {0};
	uint64_t tags[FLIGHTS];
	uint32_t count = 0;
	unsigned left = FLIGHTS * ROUNDS / 2;
	struct dmb_ring *ring;
	eventfd_t value;

	CHECK_EQUAL(dmb_ring_create(loop->backend, DEPTH, loop->flags, &ring), 0);
	CHECK_EQUAL(dmb_ring_set_eventfd(ring, loop->eventfd), 0);
	while (left) {
		struct pollfd ready = {.fd = loop->eventfd, .events = POLLIN};

		for (uint64_t tag = 0; tag < FLIGHTS; tag++)
			if (!flights[tag].batch && flights[tag].rounds++ < ROUNDS / 2)
				take_off(ring, loop, &flights[tag], tag);
		CHECK_EQUAL(dmb_ring_poll(ring, tags, FLIGHTS, &count), 0);
		for (; count; left--)
			land(loop, &flights[tags[count - 1]], tags[count - 1]), count--;
		CHECK_EQUAL(poll(&ready, 1, 10000), 1);
		eventfd_read(loop->eventfd, &value);
	}
	check_idle(ring);
	dmb_ring_destroy(ring);
	return NULL;
}

static void loops(int backend, unsigned flags)
{
	static struct loop loops[RINGS];
	pthread_t threads[RINGS], nudgers[RINGS];

	stop = false;
	for (unsigned i = 0; i < RINGS; i++) {
		loops[i].backend = backend;
		loops[i].flags = flags;
		loops[i].eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		CHECK(loops[i].eventfd >= 0);
		for (unsigned j = 0; j < FLIGHTS; j++)
			begin(&loops[i].ones[j], i * FLIGHTS + j);
		CHECK_EQUAL(pthread_create(&threads[i], NULL, drive, &loops[i]), 0);
		CHECK_EQUAL(pthread_create(&nudgers[i], NULL, nudge, &loops[i]), 0);
	}
	for (unsigned i = 0; i < RINGS; i++)
		CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
	stop = true;
	for (unsigned i = 0; i < RINGS; i++) {
		CHECK_EQUAL(pthread_join(nudgers[i], NULL), 0);
		for (unsigned j = 0; j < FLIGHTS; j++)
			end(&loops[i].ones[j]);
		close(loops[i].eventfd);
	}
}

static void with(const char *name, int backend, unsigned depth, unsigned flags)
{
	context(name, 0);
	native = flags & DMB_RING_EMULATE_NATIVE;
	uring_backend = backend == DMB_BACKEND_URING;
	for (int i = 0; i < RINGS; i++) {
		rings[i].next_slot = 0;
		pthread_mutex_init(&rings[i].lock, NULL);
		pthread_mutex_init(&rings[i].tables, NULL);
		CHECK_EQUAL(dmb_ring_create(backend, depth, flags, &rings[i].ring), 0);
		watch(rings[i].ring, i);
	}
	many();
	for (int i = 0; i < RINGS; i++) {
		check_idle(rings[i].ring);
		dmb_ring_destroy(rings[i].ring);
		pthread_mutex_destroy(&rings[i].lock);
		pthread_mutex_destroy(&rings[i].tables);
	}
}

int main(void)
{
	struct file file;

	if (!file_open(&file, PAGE))
		return finish();
	file_close(&file);
	if (dmb_uring_probe())
		skip("io_uring is refused: allow it in seccomp, or set kernel.io_uring_disabled "
		     "to 0");
	else
		with("io_uring", DMB_BACKEND_URING, DEPTH, 0);
	with("threads", DMB_BACKEND_THREADS, 3, 0);
	with("in place", DMB_BACKEND_THREADS, 0, 0);
	with("emulated native", DMB_BACKEND_THREADS, 3, DMB_RING_EMULATE_NATIVE);
	native = false;
	context("loops on threads", 0);
	loops(DMB_BACKEND_THREADS, 0);
	context("loops on io_uring", 0);
	if (!dmb_uring_probe())
		loops(DMB_BACKEND_URING, DMB_RING_SINGLE_ISSUER);
	return finish();
}
