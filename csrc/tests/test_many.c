/* SPDX-License-Identifier: MIT */
/*
 * Many threads use one file and one memory, each another part: on two rings, as in the Python
 * engine (the thread that runs a job holds the ring's lock, while others register the same slots
 * again, as after a reset), and in event loops. Every byte is compared.
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
	RINGS = 2,
	THREADS = 6,
	LOOPS = 2,
	AT_ONCE = 4, /* of a loop */
	PARTS = LOOPS * AT_ONCE,
	ROUNDS = 24,
	DEPTH = 8,
	SIZE = 24 * PAGE, /* of a part */
	WHOLE = PARTS * SIZE,
	SLOT = 40 * PAGE, /* parts lie in more than one */
	SLOTS = (WHOLE + SLOT - 1) / SLOT,
};

static struct file file;
static struct memory memory;
static int memfd;   /* behind the memory */
static bool native; /* emulated */
static atomic_bool stop;

static void prepare_all(void)
{
	CHECK(file_open(&file, WHOLE));
	memory_map(&memory, WHOLE);
	memfd = memfd_create("dmabuf-test", MFD_CLOEXEC);
	CHECK(memfd >= 0);
	CHECK_EQUAL(ftruncate(memfd, WHOLE), 0);
	CHECK(mmap(memory.bytes, WHOLE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memfd, 0) !=
	      MAP_FAILED);
}

static void check_all(void)
{
	file_check(&file);
	memory_unmap(&memory);
	file_close(&file);
	close(memfd);
}

/* -- the slots of a ring, which all of its jobs use */

static struct shared {
	struct dmb_ring *ring;
	pthread_mutex_t lock; /* held by the thread that runs a job on the ring */
	int32_t slots[SLOTS];
	bool registered;
} rings[RINGS];

/* All of them, also where they are taken: requests in flight keep what was there. */
static void register_slots(struct shared *shared)
{
	if (native) {
		CHECK_EQUAL(dmb_ring_register_dmabuf(shared->ring, 0, memfd, file.direct), 0);
		return;
	}
	for (unsigned i = 0; i < SLOTS; i++)
		CHECK_EQUAL(dmb_ring_register_buffer(shared->ring, i,
						     (uintptr_t)memory.bytes + (uint64_t)i * SLOT,
						     dmb_min(SLOT, WHOLE - (uint64_t)i * SLOT)),
			    0);
}

static void open_ring(struct shared *shared, int backend, unsigned depth)
{
	pthread_mutex_init(&shared->lock, NULL);
	CHECK_EQUAL(dmb_ring_create(backend, depth, 0, &shared->ring), 0);
	watch(shared->ring);
	shared->registered = native || backend == DMB_BACKEND_URING;
	for (int i = 0; i < SLOTS; i++)
		shared->slots[i] = i;
	if (shared->registered)
		register_slots(shared);
}

static void close_ring(struct shared *shared)
{
	check_idle(shared->ring);
	dmb_ring_destroy(shared->ring);
	pthread_mutex_destroy(&shared->lock);
}

/* -- one part */

struct part {
	uint64_t at; /* in the file and in the memory */
	uint8_t *bytes;
	unsigned dice; /* one for each thread */
};

static struct part part_of(unsigned number)
{
	uint64_t at = (uint64_t)number * SIZE;

	return (struct part){at, memory.bytes + at, number + 1};
}

static unsigned below(struct part *part, unsigned limit)
{
	return (unsigned)rand_r(&part->dice) % limit;
}

static void change(struct part *part)
{
	uint8_t by = (uint8_t)(1 + below(part, 255));

	for (unsigned i = 0; i < SIZE; i++)
		part->bytes[i] = (uint8_t)(part->bytes[i] * 5 + by + i / 512);
}

/* A transfer of the part from `skip` on. */
struct transfer {
	struct dmb_job job;
	uint64_t skip;
	uint64_t segment[3];
};

static void prepare(struct part *part, struct transfer *transfer)
{
	static pthread_mutex_t common = PTHREAD_MUTEX_INITIALIZER;
	int direction = (int)below(part, 2);
	int route = native ? DMB_NATIVE : DMB_DIRECT + (int)below(part, 3);

	if (direction == DMB_WRITE)
		change(part);
	else
		memset(part->bytes, POISON, SIZE);
	transfer->skip = below(part, 2) ? below(part, 3 * PAGE) : 0;
	transfer->segment[0] = transfer->segment[1] = part->at + transfer->skip;
	transfer->segment[2] = SIZE - transfer->skip;
	pthread_mutex_lock(&common); /* it throws the tests' common dice */
	transfer->job = make_job(&file, &memory, direction, route);
	pthread_mutex_unlock(&common);
	transfer->job.depth = 1 + below(part, DEPTH);
	transfer->job.block = PAGE << below(part, 3);
}

/* `nbytes` have moved from `skip` on; what follows may have. */
static void check(const struct part *part, const struct transfer *transfer, uint64_t nbytes)
{
	static _Thread_local uint8_t now[SIZE];
	uint8_t *known = file.bytes + part->at, *bytes = part->bytes;
	uint64_t skip = transfer->skip;

	if (transfer->job.direction == DMB_READ) {
		CHECK(!memcmp(bytes + skip, known + skip, nbytes));
		for (uint64_t i = 0; i < SIZE; i++)
			CHECK(bytes[i] == known[i] || bytes[i] == POISON);
		return;
	}
	CHECK_EQUAL(pread(file.plain, now, SIZE, (off_t)part->at), SIZE);
	CHECK(!memcmp(now + skip, bytes + skip, nbytes));
	for (uint64_t i = 0; i < SIZE; i++)
		CHECK(now[i] == bytes[i] || now[i] == known[i]);
	memcpy(known, now, SIZE);
}

/* -- threads that share rings */

static void round_of(struct part *part)
{
	struct shared *shared = &rings[below(part, RINGS)];
	bool interrupt = !below(part, 4);
	struct transfer transfer;
	struct dmb_result result;
	struct dmb_batch *batch;
	int rc = 1;

	prepare(part, &transfer);
	if (native || (shared->registered && below(part, 2)))
		transfer.job.slots = shared->slots;
	transfer.job.slot_size = native ? WHOLE : SLOT;
	pthread_mutex_lock(&shared->lock);
	CHECK_EQUAL(dmb_batch_create(shared->ring, &transfer.job, transfer.segment, 1, &batch), 0);
	for (unsigned left = interrupt ? below(part, 4) : 1000; left && rc == 1; left--)
		rc = dmb_batch_run(batch, interrupt ? 0 : 100);
	dmb_batch_drain(batch); /* at times before it is done: an interrupt */
	dmb_batch_get_result(batch, &result);
	dmb_batch_destroy(batch);
	pthread_mutex_unlock(&shared->lock);
	CHECK_EQUAL(result.error, 0);
	if (rc == 0)
		CHECK_EQUAL(result.nbytes, transfer.segment[2]);
	check(part, &transfer, result.nbytes);
}

static void *work(void *arg)
{
	for (unsigned round = 0; round < ROUNDS; round++)
		round_of(arg);
	return NULL;
}

/* What a controller's reset does beside running jobs, and files that come and go. */
static void *register_beside(void *arg)
{
	struct shared *shared = arg;

	while (shared->registered && !stop) {
		register_slots(shared);
		if (native)
			continue;
		CHECK_EQUAL(dmb_ring_register_file(shared->ring, 0, file.direct), 0);
		CHECK_EQUAL(dmb_ring_register_file(shared->ring, 0, -1), 0);
	}
	return NULL;
}

static void threads(const char *name, int backend, unsigned depth, bool emulated)
{
	struct part parts[THREADS];
	pthread_t workers[THREADS], others[RINGS];

	context(name, 0);
	prepare_all();
	native = emulated;
	dmb_testing_set_native(native ? 1U << backend : 0);
	stop = false;
	for (int i = 0; i < RINGS; i++)
		open_ring(&rings[i], backend, depth);
	for (int i = 0; i < RINGS; i++)
		CHECK_EQUAL(pthread_create(&others[i], NULL, register_beside, &rings[i]), 0);
	for (unsigned i = 0; i < THREADS; i++) {
		parts[i] = part_of(i);
		CHECK_EQUAL(pthread_create(&workers[i], NULL, work, &parts[i]), 0);
	}
	for (int i = 0; i < THREADS; i++)
		CHECK_EQUAL(pthread_join(workers[i], NULL), 0);
	stop = true;
	for (int i = 0; i < RINGS; i++) {
		CHECK_EQUAL(pthread_join(others[i], NULL), 0);
		close_ring(&rings[i]);
	}
	native = false;
	dmb_testing_set_native(0);
	check_all();
}

/* -- event loops, each with a ring of its own, and calls in other threads that wake them */

struct loop {
	unsigned number;
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

struct started {
	struct part part;
	struct dmb_batch *batch;
	struct transfer transfer;
	unsigned rounds;
	bool stopped;
};

static void start_one(struct dmb_ring *ring, struct started *started, uint64_t tag)
{
	prepare(&started->part, &started->transfer);
	CHECK_EQUAL(dmb_batch_create(ring, &started->transfer.job, started->transfer.segment, 1,
				     &started->batch),
		    0);
	dmb_batch_start(started->batch, tag);
	started->stopped = !below(&started->part, 5);
	if (started->stopped)
		dmb_batch_stop(started->batch);
}

static void finish_one(struct started *started)
{
	struct dmb_result result;

	dmb_batch_get_result(started->batch, &result);
	dmb_batch_destroy(started->batch);
	started->batch = NULL;
	CHECK_EQUAL(result.error, 0);
	if (!started->stopped)
		CHECK_EQUAL(result.nbytes, started->transfer.segment[2]);
	check(&started->part, &started->transfer, result.nbytes);
}

static void *drive(void *arg)
{
	struct loop *loop = arg;
	struct started started[AT_ONCE] = {0};
	struct dmb_done done[AT_ONCE];
	uint32_t count = 0;
	unsigned left = AT_ONCE * ROUNDS / 2;
	struct dmb_ring *ring;
	eventfd_t value;

	CHECK_EQUAL(dmb_ring_create(loop->backend, DEPTH, loop->flags, &ring), 0);
	watch(ring);
	CHECK_EQUAL(dmb_ring_set_eventfd(ring, loop->eventfd), 0);
	for (unsigned i = 0; i < AT_ONCE; i++)
		started[i].part = part_of(loop->number * AT_ONCE + i);
	while (left) {
		struct pollfd ready = {.fd = loop->eventfd, .events = POLLIN};

		for (uint64_t tag = 0; tag < AT_ONCE; tag++)
			if (!started[tag].batch && started[tag].rounds++ < ROUNDS / 2)
				start_one(ring, &started[tag], tag);
		CHECK_EQUAL(dmb_ring_poll(ring, done, AT_ONCE, &count), 0);
		for (; count; count--, left--)
			finish_one(&started[done[count - 1].tag]);
		CHECK_EQUAL(poll(&ready, 1, 10000), 1);
		eventfd_read(loop->eventfd, &value);
	}
	check_idle(ring);
	dmb_ring_destroy(ring);
	return NULL;
}

static void loops(const char *name, int backend, unsigned flags)
{
	struct loop loops[LOOPS];
	pthread_t drivers[LOOPS], nudgers[LOOPS];

	context(name, 0);
	prepare_all();
	stop = false;
	for (unsigned i = 0; i < LOOPS; i++) {
		loops[i] = (struct loop){i, backend, flags, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
		CHECK(loops[i].eventfd >= 0);
		CHECK_EQUAL(pthread_create(&drivers[i], NULL, drive, &loops[i]), 0);
		CHECK_EQUAL(pthread_create(&nudgers[i], NULL, nudge, &loops[i]), 0);
	}
	for (int i = 0; i < LOOPS; i++)
		CHECK_EQUAL(pthread_join(drivers[i], NULL), 0);
	stop = true;
	for (int i = 0; i < LOOPS; i++) {
		CHECK_EQUAL(pthread_join(nudgers[i], NULL), 0);
		close(loops[i].eventfd);
	}
	check_all();
}

int main(void)
{
	if (!file_open(&file, PAGE))
		return finish();
	file_close(&file);
	threads("threads", DMB_BACKEND_THREADS, 3, false);
	threads("in place", DMB_BACKEND_THREADS, 0, false);
	threads("emulated native", DMB_BACKEND_THREADS, 3, true);
	loops("loops on threads", DMB_BACKEND_THREADS, 0);
	if (dmb_uring_probe()) {
		skip("io_uring is refused: allow it in seccomp, or set kernel.io_uring_disabled "
		     "to 0");
		return finish();
	}
	threads("io_uring", DMB_BACKEND_URING, DEPTH, false);
	threads("emulated native on io_uring", DMB_BACKEND_URING, DEPTH, true);
	loops("loops on io_uring", DMB_BACKEND_URING, DMB_RING_SINGLE_ISSUER);
	return finish();
}
