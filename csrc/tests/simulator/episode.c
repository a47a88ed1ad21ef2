/* SPDX-License-Identifier: MIT */
/*
 * One episode: a random file, a random memory, random faults, and transfers of every kind. After
 * each transfer every byte of the file and of the memory is compared with a model.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../batch.h"
#include "episode.h"
#include "virtual.h"

enum {
	MEMORY_PAGES = 20,
	MEMORY = MEMORY_PAGES * VIRTUAL_PAGE,
	SLAB = 4 * VIRTUAL_PAGE,
	SEGMENTS = 5,
	FLIGHTS = 4, /* transfers of one ring at once */
	SLOTS = MEMORY_PAGES,
};

static uint64_t transfers;

uint64_t transfers_done(void)
{
	return transfers;
}

/* -- the model */

/*
 * What the file must hold. Where `unsure`, a transfer failed or was stopped, and the byte may also
 * be the other one.
 */
static struct {
	uint8_t file[FILE_MOST], other[FILE_MOST];
	uint8_t unsure[FILE_MOST]; /* 2: two writes failed, and any byte may be there */
	uint8_t memory[MEMORY];
} model;

static uint8_t space[MEMORY + 2 * VIRTUAL_PAGE] __attribute__((aligned(4096)));
static uint8_t *const memory = space + VIRTUAL_PAGE;

static uint64_t noise_state; /* xorshift64: its values decide nothing */

static void noise(uint8_t *bytes, size_t size)
{
	uint64_t state = noise_state;

	for (size_t i = 0; i < size; i += 8) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		memcpy(bytes + i, &state, size - i < 8 ? size - i : 8);
	}
	noise_state = state;
}

static bool may_hold(uint64_t at, uint8_t byte)
{
	return byte == model.file[at] || (model.unsure[at] && byte == model.other[at]) ||
	       model.unsure[at] > 1;
}

/* Compare bytes of the file with the model. */
static void check_file(const uint8_t *now, uint64_t start, uint64_t end, const char *where)
{
	if (end <= start || !memcmp(now + start, model.file + start, end - start))
		return;
	for (uint64_t at = start; at < end; at++)
		if (!may_hold(at, now[at]))
			broken("undetected: byte %#llx of the file is %#x and not %#x, %s",
			       (unsigned long long)at, now[at], model.file[at], where);
}

/* -- one transfer */

struct part {
	uint64_t file_start, file_end, memory_start, memory_end; /* nobody else uses these */
};

struct transfer {
	struct dmb_job job;
	struct part part;
	uint64_t segments[3 * SEGMENTS];
	size_t count;
	uint64_t total;
	int32_t slots[SLOTS];
	struct dmb_batch *batch;
	const struct dmb_io *ios;
	uint32_t shared; /* DMB_SHARED_... */
	bool stopped, small;
	uint64_t size; /* the file's size before it: others may cut the file */
};

static uint64_t near(uint64_t limit, uint64_t align)
{
	uint64_t value = choose(limit + 1), how = choose(4);

	if (how < 2)
		return value - value % align;
	if (how == 2)
		return dmb_min(value - value % align + 1, limit);
	return value;
}

static void sort(uint64_t *values, size_t count)
{
	for (size_t i = 1; i < count; i++)
		for (size_t j = i; j && values[j] < values[j - 1]; j--) {
			uint64_t swap = values[j];

			values[j] = values[j - 1];
			values[j - 1] = swap;
		}
}

/* Segments that overlap nowhere on the side that is written to, in any order. */
static void make_segments(struct transfer *transfer)
{
	const struct part *part = &transfer->part;
	const bool read = transfer->job.direction == DMB_READ;
	uint64_t file_size = part->file_end - part->file_start;
	uint64_t memory_size = part->memory_end - part->memory_start;
	uint64_t to = read ? memory_size : file_size, from = read ? file_size : memory_size;
	uint64_t align = transfer->job.nsid && !read ? world.file.block : 512U << choose(4);
	uint64_t cuts[2 * SEGMENTS];

	if (read && part->file_end == world.file.size && choose(4) == 3)
		from += 2 * VIRTUAL_PAGE; /* past the end of the file */
	transfer->count = 1 + choose(SEGMENTS);
	for (size_t i = 0; i < 2 * transfer->count; i++)
		cuts[i] = near(to, align);
	sort(cuts, 2 * transfer->count);
	transfer->total = 0;
	for (size_t i = 0; i < transfer->count; i++) {
		uint64_t *segment = transfer->segments + 3 * i;
		uint64_t start = cuts[2 * i], size = dmb_min(cuts[2 * i + 1] - start, from);
		uint64_t other = near(from - size, 512);

		if (!choose(2) &&
		    other - other % VIRTUAL_PAGE + start % VIRTUAL_PAGE + size <= from)
			other = other - other % VIRTUAL_PAGE + start % VIRTUAL_PAGE;
		if (transfer->job.nsid && !read) {
			start -= start % world.file.block;
			size -= size % world.file.block;
		}
		segment[0] = part->file_start + (read ? other : start);
		segment[1] = part->memory_start + (read ? start : other);
		segment[2] = size;
		transfer->total += size;
	}
	if (transfer->count > 1 && choose(2)) {
		for (int k = 0; k < 3; k++) {
			uint64_t swap = transfer->segments[k];

			transfer->segments[k] = transfer->segments[3 * transfer->count - 3 + k];
			transfer->segments[3 * transfer->count - 3 + k] = swap;
		}
	}
}

/* Slots of the ring: pinned memory for `direct`, dma-bufs for `native`. */
static void register_slots(struct dmb_ring *ring, struct transfer *transfer)
{
	struct dmb_job *job = &transfer->job;
	bool native = job->route == DMB_NATIVE;

	if (!native && (job->route != DMB_DIRECT || ring->info.buffer_table || choose(2)))
		return;
	job->slot_size = native ? SLAB : VIRTUAL_PAGE * (1 + choose(4));
	job->slots = transfer->slots;
	for (uint64_t i = 0, at = 0; at < MEMORY; i++, at += job->slot_size) {
		uint64_t size = dmb_min(job->slot_size, MEMORY - at);
		int rc;

		transfer->slots[i] = -1;
		if (!native && choose(4) == 3)
			continue;
		if (native)
			rc = dmb_ring_register_dmabuf(ring, (unsigned)i, SLAB_FD + (int)i,
						      DIRECT_FD);
		else /* other slots than those of dma-bufs, whose requests may be in flight */
			rc = dmb_ring_register_buffer(ring, 100 + (unsigned)i,
						      (uintptr_t)memory + at, size);
		if (!rc)
			transfer->slots[i] = (native ? 0 : 100) + (int32_t)i;
	}
	if (native)
		job->slab_size = SLAB;
}

static void make_job(struct dmb_ring *ring, struct transfer *transfer)
{
	const struct virtual_file *file = &world.file;
	bool uring = ring->info.backend == DMB_BACKEND_URING;
	static const int routes[] = {DMB_BUFFERED, DMB_DIRECT, DMB_STAGED, DMB_DIRECT, DMB_NATIVE};
	int route = routes[choose(uring ? 5 : 4)];
	bool direct;

	if (file->passthrough && route == DMB_BUFFERED)
		route = DMB_DIRECT;
	direct = route != DMB_BUFFERED;
	*transfer = (struct transfer){.part = transfer->part, .size = file->size};
	transfer->job = (struct dmb_job){
		.fd = direct ? DIRECT_FD : PLAIN_FD,
		.plain_fd = PLAIN_FD,
		.offset_align = direct ? file->block : 1,
		.memory_align = direct ? file->memory_align : 1,
		.page = file->passthrough ? file->block : VIRTUAL_PAGE,
		.stale_cache = direct && file->device && !file->passthrough,
		.nsid = file->passthrough,
		.lba_shift = file->block == 512 ? 9 : 12,
		.base = (uintptr_t)memory,
		.size = MEMORY,
		.slab_size = MEMORY,
		.direction = choose(2) ? DMB_WRITE : DMB_READ,
		.route = route,
		.file_size = file->size,
		.file_slot = -1,
		.depth = 1 + (uint32_t)choose(12),
		.block = VIRTUAL_PAGE << choose(4),
	};
	make_segments(transfer);
	register_slots(ring, transfer);
	if (!ring->info.file_table && choose(2) &&
	    !dmb_ring_register_file(ring, direct, transfer->job.fd))
		transfer->job.file_slot = direct;
	if (route == DMB_NATIVE && choose(4) == 3)
		transfer->job.base = 0; /* the CPU cannot map it */
}

/* Give both sides bytes that differ, so that a byte that did not move shows. */
static void fill(struct transfer *transfer)
{
	uint64_t size = transfer->part.memory_end - transfer->part.memory_start;

	noise(memory + transfer->part.memory_start, size);
	memcpy(model.memory + transfer->part.memory_start, memory + transfer->part.memory_start,
	       size);
}

/* Whether a byte of memory is one that a read of file offset `from` can have brought. */
static bool may_have_come(const struct transfer *transfer, uint64_t from, uint8_t byte)
{
	if (from < world.file.size)
		return may_hold(from, byte);
	return from < transfer->size && (!byte || may_hold(from, byte)); /* it was cut meanwhile */
}

/* Check the memory after a read, and bring the model up to date. */
static void check_read(const struct transfer *transfer, uint64_t nbytes)
{
	const struct part *part = &transfer->part;
	uint64_t position = 0;

	for (size_t i = 0; i < transfer->count; i++) {
		const uint64_t *segment = transfer->segments + 3 * i;
		uint64_t sure = nbytes > position ? dmb_min(nbytes - position, segment[2]) : 0;
		uint8_t *now = memory + segment[1], *before = model.memory + segment[1];
		uint64_t skip = 0;

		if (segment[0] + sure <= world.file.size &&
		    !memcmp(now, model.file + segment[0], sure))
			skip = sure;
		for (; skip < segment[2]; skip++) {
			bool right = may_have_come(transfer, segment[0] + skip, now[skip]);

			if (!right && (skip < sure || now[skip] != before[skip]))
				broken("undetected: byte %#llx of the memory is %#x, before %#x, "
				       "position %llu of %llu moved",
				       (unsigned long long)(segment[1] + skip), now[skip],
				       before[skip], (unsigned long long)(position + skip),
				       (unsigned long long)nbytes);
		}
		memcpy(before, now, segment[2]);
		position += segment[2];
	}
	if (memcmp(memory + part->memory_start, model.memory + part->memory_start,
		   part->memory_end - part->memory_start))
		broken("undetected: a read changed memory outside its segments");
}

static void check_written(const struct transfer *transfer, uint64_t nbytes)
{
	uint64_t position = 0;

	for (size_t i = 0; i < transfer->count; i++) {
		const uint64_t *segment = transfer->segments + 3 * i;
		uint64_t sure = nbytes > position ? dmb_min(nbytes - position, segment[2]) : 0;

		position += segment[2];
		memcpy(model.file + segment[0], memory + segment[1], sure);
		memset(model.unsure + segment[0], 0, sure);
		for (uint64_t skip = sure; skip < segment[2]; skip++) {
			uint64_t at = segment[0] + skip;

			model.unsure[at] = model.unsure[at] ? 2 : 1;
			model.other[at] = model.file[at];
			model.file[at] = memory[segment[1] + skip];
		}
	}
	if (memcmp(memory + transfer->part.memory_start, model.memory + transfer->part.memory_start,
		   transfer->part.memory_end - transfer->part.memory_start))
		broken("undetected: a write changed the memory");
}

/* After a failed write, what the file holds is what it holds, if the cache and the medium agree. */
static void trust_the_file(const struct transfer *transfer, const uint8_t *view)
{
	for (size_t i = 0; i < transfer->count; i++) {
		const uint64_t *segment = transfer->segments + 3 * i;

		for (uint64_t at = segment[0]; at < segment[0] + segment[2]; at++) {
			if (!model.unsure[at] || view[at] != world.file.medium[at])
				continue;
			model.file[at] = view[at];
			model.unsure[at] = 0;
		}
	}
}

static void check_result(const struct transfer *transfer, const struct dmb_result *result)
{
	const struct dmb_job *job = &transfer->job;
	const bool stale = job->direction == DMB_WRITE && job->stale_cache;
	uint64_t position = 0;

	if (result->nbytes > transfer->total)
		broken("%llu of %llu bytes moved", (unsigned long long)result->nbytes,
		       (unsigned long long)transfer->total);
	if (result->error) {
		bool known = result->error < 256 && world.errors[result->error];

		if (!known && !(result->error == EBUSY && stale) &&
		    !(result->error == EFAULT && job->route == DMB_NATIVE) &&
		    !(result->error == EBUSY && world.faults.submit))
			broken("error %d, which nothing answered", result->error);
		if (transfer->stopped)
			return; /* edges before the error may be left */
		for (size_t i = 0; i < transfer->count;
		     position += transfer->segments[3 * i++ + 2]) {
			const uint64_t *segment = transfer->segments + 3 * i;

			if (result->nbytes - position >= segment[2])
				continue;
			if (result->error_offset != segment[0] + (result->nbytes - position))
				broken("error at %llu, after %llu bytes",
				       (unsigned long long)result->error_offset,
				       (unsigned long long)result->nbytes);
			return;
		}
		broken("an error after all bytes");
	}
	if (result->short_segment >= 0 && !transfer->stopped) {
		const uint64_t *segment = transfer->segments + 3 * result->short_segment;

		for (int64_t i = 0; i < result->short_segment; i++)
			position += transfer->segments[3 * i + 2];
		if (result->nbytes < position || result->nbytes - position >= segment[2] ||
		    segment[0] + (result->nbytes - position) < world.file.size)
			broken("the end of the file in segment %lld after %llu bytes",
			       (long long)result->short_segment,
			       (unsigned long long)result->nbytes);
		return;
	}
	if (result->nbytes != transfer->total && !transfer->stopped)
		broken("%llu of %llu bytes, and no reason", (unsigned long long)result->nbytes,
		       (unsigned long long)transfer->total);
}

static void check_returned(const struct transfer *transfer)
{
	unsigned count = 0;

	if (transfer->ios)
		count = in_flight_between(transfer->ios, transfer->ios + transfer->job.depth);
	if (count)
		broken("in flight at return: %u requests of the transfer", count);
}

/* What must hold when a transfer has returned. */
static void check_transfer(const struct transfer *transfer, const struct dmb_result *result)
{
	static uint8_t view[FILE_MOST];
	const struct part *part = &transfer->part;

	transfers++;
	happened("result", result->nbytes, (uint64_t)result->error, result->requests);
	check_returned(transfer);
	check_result(transfer, result);
	file_view(view);
	if (transfer->job.direction == DMB_READ) {
		check_read(transfer, result->nbytes);
		check_file(view, part->file_start, dmb_min(part->file_end, world.file.size),
			   "after a read");
		return;
	}
	check_written(transfer, result->nbytes);
	check_file(view, part->file_start, part->file_end, "after a write, read through the cache");
	trust_the_file(transfer, view);
}

/* -- the ways to run one */

static struct dmb_result nothing(void)
{
	return (struct dmb_result){.short_segment = -1};
}

static void remember_ios(struct transfer *transfer)
{
	if (transfer->batch)
		transfer->ios = transfer->batch->ios;
}

/* As the engine does: slices, after each of which it may stop and drain. */
static void run_in_slices(struct dmb_ring *ring, struct transfer *transfer)
{
	static const int slices[] = {100, 1, 0};
	const uint64_t patience = choose(4) == 3 ? choose(20) : UINT64_MAX;
	struct dmb_result result = nothing();
	struct dmb_measure measure;
	uint64_t joined[3 * SEGMENTS];
	int rc;

	world.failing = true;
	rc = dmb_job_measure(&transfer->job, transfer->segments, transfer->count, &measure);
	if (rc && rc != -ENOMEM)
		broken("measuring answers %d", rc);
	if (!rc && choose(2)) {
		dmb_segments_join(transfer->segments, transfer->count, joined);
		transfer->count = measure.joined;
		memcpy(transfer->segments, joined, 3 * measure.joined * sizeof(*joined));
	}
	for (uint64_t slice = 0;; slice++) {
		rc = dmb_job_run(ring, &transfer->job, transfer->segments, transfer->count,
				 slices[choose(3)], &transfer->batch, &result);
		if (rc <= 0)
			break;
		remember_ios(transfer);
		if (slice < patience)
			continue;
		transfer->stopped = true;
		happened("stop", slice, 0, 0);
		dmb_batch_drain(transfer->batch);
		check_returned(transfer);
	}
	world.failing = false;
	if (rc && (!world.errors[-rc] && rc != -EINTR))
		broken("running answers %d", rc);
	if (rc)
		transfer->stopped = true;
	if (transfer->batch)
		broken("a batch is left");
	check_transfer(transfer, &result);
	if (ring->in_flight || in_flight())
		broken("in flight at return: %u and %u", ring->in_flight, in_flight());
}

static void run_small(struct transfer *transfer)
{
	const uint64_t *segment = transfer->segments;
	struct dmb_result result = nothing();

	transfer->count = 1;
	transfer->total = segment[2];
	transfer->stopped = true; /* 0 is not a result */
	world.failing = true;
	if (dmb_job_run_small(&transfer->job, segment[0], segment[1], segment[2], 1))
		result.nbytes = segment[2];
	world.failing = false;
	check_transfer(transfer, &result);
}

/* -- an event loop */

/* As the package does it: no write past the cache beside one through it, in one page. */
static bool its_turn(struct transfer *transfer, uint32_t others)
{
	struct dmb_measure measure;

	if (dmb_job_measure(&transfer->job, transfer->segments, transfer->count, &measure))
		broken("no measure");
	transfer->shared = transfer->job.route == DMB_BUFFERED && measure.shared_pages
				   ? DMB_SHARED_CACHED
				   : measure.shared_pages;
	return !transfer->shared || !others ||
	       (transfer->shared | others) != (DMB_SHARED_DIRECT | DMB_SHARED_CACHED);
}

static void start(struct dmb_ring *ring, struct transfer *transfer, uint64_t tag, uint32_t others)
{
	const uint64_t *segment = transfer->segments;
	int rc;

	make_job(ring, transfer);
	if (!its_turn(transfer, others))
		return;
	fill(transfer);
	transfer->small = !transfer->job.nsid && transfer->job.base && choose(3) == 2;
	world.failing = true;
	if (transfer->small) {
		transfer->count = 1;
		transfer->total = segment[2];
		rc = dmb_job_start_small(ring, &transfer->job, segment[0], segment[1], segment[2],
					 0, tag, &transfer->batch);
		if (!rc)
			transfer->job.depth = 1;
	} else {
		rc = dmb_batch_create(ring, &transfer->job, transfer->segments, transfer->count,
				      &transfer->batch);
		if (!rc)
			dmb_batch_start(transfer->batch, tag);
	}
	world.failing = false;
	if (rc && rc != -EOPNOTSUPP && rc != -ENOMEM)
		broken("starting answers %d", rc);
	remember_ios(transfer);
}

static void end(struct transfer *transfer, uint64_t nbytes)
{
	struct dmb_result result;

	dmb_batch_get_result(transfer->batch, &result);
	if (result.nbytes != nbytes)
		broken("two results: %llu and %llu bytes", (unsigned long long)nbytes,
		       (unsigned long long)result.nbytes);
	dmb_batch_destroy(transfer->batch);
	transfer->batch = NULL;
	check_transfer(transfer, &result);
}

/* Parts of the file and of the memory, which meet anywhere. */
static void make_parts(struct transfer *flights)
{
	uint64_t cuts[FLIGHTS + 1] = {0};

	for (uint64_t i = 1; i < FLIGHTS; i++)
		cuts[i] = near(world.file.size, world.file.passthrough ? VIRTUAL_PAGE : 512);
	if (world.file.passthrough)
		for (uint64_t i = 1; i < FLIGHTS; i++)
			cuts[i] -= cuts[i] % VIRTUAL_PAGE;
	cuts[FLIGHTS] = world.file.size;
	sort(cuts, FLIGHTS);
	for (uint64_t i = 0; i < FLIGHTS; i++)
		flights[i].part = (struct part){cuts[i], cuts[i + 1], i * MEMORY / FLIGHTS,
						(i + 1) * MEMORY / FLIGHTS};
}

static void loop(struct dmb_ring *ring)
{
	struct transfer flights[FLIGHTS] = {0};
	uint64_t left = 1 + choose(12), running = 0;

	if (dmb_ring_set_eventfd(ring, EVENT_FD))
		broken("no eventfd");
	make_parts(flights);
	while (left || running) {
		struct dmb_done done[FLIGHTS];
		uint32_t reported = 0, capacity = 1 + (uint32_t)choose(FLIGHTS);
		uint64_t at = choose(FLIGHTS);
		uint32_t others = 0;
		int rc;

		for (int i = 0; i < FLIGHTS; i++)
			others |= flights[i].batch ? flights[i].shared : 0;
		if (left && !flights[at].batch) {
			left--;
			start(ring, &flights[at], at, others);
			running += flights[at].batch != NULL;
		} else if (flights[at].batch && choose(16) == 15) {
			happened("stop", at, 0, 0);
			flights[at].stopped = true;
			dmb_batch_stop(flights[at].batch);
		} else if (!world.signals && running) {
			world.failing = true;
			if (!next_event() && !world.signals)
				broken("transfers that do not end: no event, and no signal");
			world.failing = false;
			continue;
		}
		world.signals = 0;
		world.failing = true;
		rc = dmb_ring_poll(ring, done, capacity, &reported);
		world.failing = false;
		if (rc)
			broken("polling answers %d", rc);
		world.signals += reported == capacity; /* there may be more */
		for (uint32_t i = 0; i < reported; i++) {
			end(&flights[done[i].tag], done[i].nbytes);
			running--;
		}
	}
	if (in_flight() || ring->in_flight)
		broken("in flight at return of the last");
	dmb_ring_set_eventfd(ring, -1);
}

/* -- the episode */

static void make_world(void)
{
	struct virtual_file *file = &world.file;
	struct faults *faults = &world.faults;
	uint32_t how_often;

	world_reset();
	noise_state = 88172645463325252;
	file->block = choose(2) ? 4096 : 512;
	file->memory_align = choose(2) ? file->block : choose(2) ? 4 : 512;
	file->device = choose(2);
	file->passthrough = file->device && choose(4) == 3;
	file->folio = choose(2) ? 4 : 1;
	file->size = near(FILE_MOST, VIRTUAL_PAGE);
	if (file->device)
		file->size -= file->size % VIRTUAL_PAGE;
	if (file->size < VIRTUAL_PAGE)
		file->size = VIRTUAL_PAGE;
	noise(file->medium, FILE_MOST);
	memset(file->medium + file->size, 0, FILE_MOST - file->size);
	memcpy(model.file, file->medium, FILE_MOST);
	memset(model.unsure, 0, sizeof(model.unsure));
	noise(space, sizeof(space));
	memcpy(model.memory, memory, MEMORY);
	for (unsigned i = 0; i < MEMORY / SLAB; i++) {
		world.slabs[i] = memory + (uint64_t)i * SLAB;
		world.slab_sizes[i] = SLAB;
	}
	world.others = choose(2) && !file->passthrough;
	if (choose(8) == 7)
		for (uint64_t i = 1 + choose(3); i; i--)
			file->bad[choose(file->size / 512)] = true;
	how_often = 1U << choose(7);
	faults->latency = 1U << choose(9);
	faults->short_count = choose(2) ? 8 * how_often : 0;
	faults->again = choose(2) ? 8 * how_often : 0;
	if (choose(16) == 15)
		faults->again = 950; /* up to where the core gives up */
	faults->error = choose(4) == 3 ? how_often : 0;
	faults->lost = choose(16) == 15 ? 20 : 0;
	faults->interrupt = choose(2) ? 4 * how_often : 0;
	faults->submit = choose(4) == 3 ? 4 * how_often : 0;
	faults->memory = choose(8) == 7 ? how_often : 0;
	faults->reset = choose(8) == 7 ? how_often : 0;
}

static struct dmb_ring *make_ring(void)
{
	static const struct {
		int backend;
		unsigned flags;
	} kinds[] = {
		{DMB_BACKEND_URING, 0},
		{DMB_BACKEND_URING, DMB_RING_SINGLE_ISSUER},
		{DMB_BACKEND_THREADS, 0}, /* without workers, in this thread */
	};
	uint64_t kind = choose(5) == 4 ? 2 : choose(2);
	unsigned depth = kind == 2 ? 0 : 1 + (unsigned)choose(16);
	unsigned flags = kinds[kind].flags;
	struct dmb_ring *ring;

	if (kind < 2 && world.file.passthrough)
		flags |= DMB_RING_PASSTHROUGH;
	if (dmb_ring_create(kinds[kind].backend, depth, flags, &ring))
		broken("no ring");
	return ring;
}

static void one_by_one(struct dmb_ring *ring)
{
	struct transfer transfer = {.part = {0, world.file.size, 0, MEMORY}};

	for (uint64_t left = 1 + choose(6); left; left--) {
		transfer.part.file_end = world.file.size;
		make_job(ring, &transfer);
		fill(&transfer);
		if (!transfer.job.nsid && transfer.job.base && choose(8) == 7) {
			run_small(&transfer);
			continue;
		}
		if (transfer.job.direction == DMB_READ && !world.file.device && choose(16) == 15 &&
		    world.file.size > VIRTUAL_PAGE) {
			world.truncated = VIRTUAL_PAGE + choose(world.file.size - VIRTUAL_PAGE);
		}
		run_in_slices(ring, &transfer);
		world.truncated = UINT64_MAX;
	}
}

uint64_t episode(void)
{
	static uint8_t view[FILE_MOST];
	struct dmb_ring *ring;

	make_world();
	ring = make_ring();
	if (choose(3) == 2 && ring->info.backend == DMB_BACKEND_URING)
		loop(ring);
	else
		one_by_one(ring);
	if (ring->stage.free_count != ring->stage.count)
		broken("leaked: %u of %u staging blocks",
		       ring->stage.count - ring->stage.free_count, ring->stage.count);
	dmb_ring_destroy(ring);
	if (world.allocations)
		broken("leaked: %lld allocations", (long long)world.allocations);
	file_view(view);
	check_file(view, 0, world.file.size, "at the end, through the cache");
	file_write_out();
	check_file(world.file.medium, 0, world.file.size, "at the end, on the medium");
	return history();
}
