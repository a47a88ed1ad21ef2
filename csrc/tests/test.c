/* SPDX-License-Identifier: MIT */
#include "test.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static const char *where = "";
static unsigned where_round;
static const char *ring_name = "";
static bool skipped;
static uint64_t random_state = 0x9e3779b97f4a7c15;

void check_failed(const char *file, int line, const char *what)
{
	fprintf(stderr, "%s:%d: not so: %s (%s, round %u, ring %s)\n", file, line, what, where,
		where_round, ring_name);
	exit(1);
}

void skip(const char *reason)
{
	if (!skipped)
		fprintf(stderr, "skipped: %s\n", reason);
	skipped = true;
}

int finish(void)
{
	return skipped ? 77 : 0;
}

void context(const char *what, unsigned round)
{
	where = what;
	where_round = round;
}

/* xorshift64* */
static uint64_t random_next(void)
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return random_state * 0x2545f4914f6cdd1d;
}

uint64_t random_below(uint64_t limit)
{
	return limit ? random_next() % limit : 0;
}

void random_bytes(uint8_t *bytes, size_t size)
{
	for (size_t i = 0; i < size; i++)
		bytes[i] = (uint8_t)(random_next() >> 32);
}

uint64_t random_near(uint64_t limit, uint64_t align)
{
	uint64_t value = random_below(limit + 1);

	switch (random_below(4)) {
	case 0:
		return value;
	case 1:
		return dmb_min(dmb_align_down(value, align) + 1, limit);
	default:
		return dmb_align_down(value, align);
	}
}

void on_each_ring(void (*test)(struct dmb_ring *ring))
{
	static const struct {
		const char *name;
		int backend;
		unsigned depth, flags;
	} kinds[] = {
		{"io_uring", DMB_BACKEND_URING, 8, 0},
		{"io_uring, owned", DMB_BACKEND_URING, 8, DMB_RING_SINGLE_ISSUER},
		{"3 threads", DMB_BACKEND_THREADS, 3, 0},
		{"in place", DMB_BACKEND_THREADS, 0, 0},
	};

	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
		struct dmb_ring *ring;

		ring_name = kinds[i].name;
		if (kinds[i].backend == DMB_BACKEND_URING) {
#ifdef __SANITIZE_THREAD__
			continue; /* it cannot see what the kernel orders */
#endif
			if (dmb_uring_probe()) {
				skip("io_uring is refused: allow it in seccomp, or set "
				     "kernel.io_uring_disabled to 0");
				continue;
			}
		}
		CHECK_EQUAL(
			dmb_ring_create(kinds[i].backend, kinds[i].depth, kinds[i].flags, &ring),
			0);
		test(ring);
		check_idle(ring);
		dmb_ring_destroy(ring);
	}
	ring_name = "";
}

void memory_map(struct memory *memory, uint64_t size)
{
	uint8_t *all;

	memory->size = dmb_align_up(size, PAGE);
	all = mmap(NULL, memory->size + 2 * PAGE, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(all != MAP_FAILED);
	memory->bytes = all + PAGE;
	CHECK_EQUAL(mprotect(memory->bytes, memory->size, PROT_READ | PROT_WRITE), 0);
}

void memory_unmap(struct memory *memory)
{
	CHECK_EQUAL(munmap(memory->bytes - PAGE, memory->size + 2 * PAGE), 0);
	memory->bytes = NULL;
}

static bool open_in(struct file *file, const char *folder)
{
	uint32_t align[2] = {0, 0};
	char path[4096];
	int rc = 0;

	if (!folder)
		return false;
	snprintf(path, sizeof(path), "%s/dmabuf-test-XXXXXX", folder);
	file->plain = mkostemp(path, O_CLOEXEC);
	if (file->plain < 0)
		return false;
	file->direct = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	unlink(path);
	if (file->direct >= 0)
		rc = dmb_statx_dio(file->direct, align);
	file->memory_align = align[0];
	file->offset_align = align[1];
	if (file->direct >= 0 && !rc && file->offset_align)
		return true;
	if (file->direct >= 0)
		close(file->direct);
	close(file->plain);
	return false;
}

bool file_open(struct file *file, uint64_t size)
{
	if (!open_in(file, getenv("TMPDIR")) && !open_in(file, "/tmp") && !open_in(file, ".")) {
		skip("no O_DIRECT alignment known here: set TMPDIR to a folder on ext4 or xfs, on "
		     "Linux 6.1 or later");
		return false;
	}
	file->size = size;
	file->bytes = malloc(size ? size : 1);
	CHECK(file->bytes);
	random_bytes(file->bytes, size);
	CHECK_EQUAL(pwrite(file->plain, file->bytes, size, 0), size);
	CHECK_EQUAL(fdatasync(file->plain), 0);
	return true;
}

void file_close(struct file *file)
{
	close(file->direct);
	close(file->plain);
	free(file->bytes);
}

void file_check(const struct file *file)
{
	uint8_t *bytes = malloc(file->size + 1);

	CHECK(bytes);
	CHECK_EQUAL(pread(file->plain, bytes, file->size + 1, 0), file->size);
	CHECK_EQUAL(memcmp(bytes, file->bytes, file->size), 0);
	free(bytes);
}

struct dmb_job make_job(const struct file *file, const struct memory *memory, int direction,
			int route)
{
	bool direct = route != DMB_BUFFERED;

	return (struct dmb_job){
		.fd = direct ? file->direct : file->plain,
		.file_slot = -1,
		.plain_fd = file->plain,
		.offset_align = direct ? file->offset_align : 1,
		.memory_align = direct ? file->memory_align : 1,
		.page = PAGE,
		.file_size = file->size,
		.base = (uintptr_t)memory->bytes,
		.size = memory->size,
		.direction = direction,
		.route = route,
		.depth = 1 + (uint32_t)random_below(12),
		.block = PAGE << random_below(5),
	};
}

static int ascending(const void *a, const void *b)
{
	const uint64_t *left = a, *right = b;

	return *left < *right ? -1 : *left > *right;
}

size_t random_segments(uint64_t *segments, size_t count, uint64_t file_size, uint64_t memory_size,
		       int direction)
{
	uint64_t limit = direction == DMB_READ ? memory_size : file_size;
	uint64_t other = direction == DMB_READ ? file_size : memory_size;
	uint64_t *cuts = malloc(2 * count * sizeof(*cuts));

	CHECK(cuts);
	for (size_t i = 0; i < 2 * count; i++)
		cuts[i] = random_near(limit, 512 << random_below(4));
	qsort(cuts, 2 * count, sizeof(*cuts), ascending);
	for (size_t i = 0; i < count; i++) {
		uint64_t *segment = segments + 3 * i;
		uint64_t start = cuts[2 * i], size = cuts[2 * i + 1] - start, elsewhere;

		size = dmb_min(size, other);
		elsewhere = random_near(other - size, 512);
		if (random_below(2) && elsewhere + start % PAGE + size <= other)
			elsewhere = dmb_align_down(elsewhere, PAGE) + start % PAGE;
		segment[0] = direction == DMB_READ ? elsewhere : start;
		segment[1] = direction == DMB_READ ? start : elsewhere;
		segment[2] = size;
	}
	free(cuts);
	for (size_t i = count; i > 1; i--) { /* in no order */
		size_t j = random_below(i);

		for (int k = 0; k < 3; k++) {
			uint64_t swap = segments[3 * (i - 1) + k];

			segments[3 * (i - 1) + k] = segments[3 * j + k];
			segments[3 * j + k] = swap;
		}
	}
	return count;
}

uint64_t offset_of(const uint64_t *segments, size_t count, uint64_t position)
{
	for (size_t i = 0; i < count; position -= segments[3 * i++ + 2])
		if (position < segments[3 * i + 2])
			return segments[3 * i] + position;
	return UINT64_MAX;
}

/*
 * For each byte of the target its value where it moved, and 1 where it has to have moved, 2 where
 * it may, 0 where it must not.
 */
struct expected {
	uint8_t *value, *moved;
};

static void expect(struct expected *expected, const struct file *file, const struct memory *memory,
		   const uint64_t *segments, size_t count, int direction, uint64_t nbytes)
{
	uint64_t position = 0;

	for (size_t i = 0; i < count; i++) {
		const uint64_t *segment = segments + 3 * i;

		for (uint64_t j = 0; j < segment[2]; j++, position++) {
			uint64_t offset = segment[0] + j, address = segment[1] + j;
			uint64_t target = direction == DMB_READ ? address : offset;

			if (direction == DMB_READ && offset >= file->size) {
				CHECK(position >= nbytes);
				continue;
			}
			expected->value[target] = direction == DMB_READ ? file->bytes[offset]
									: memory->bytes[address];
			expected->moved[target] = position < nbytes ? 1 : 2;
		}
	}
}

void check_moved(const struct file *file, const struct memory *memory, const uint64_t *segments,
		 size_t count, int direction, uint64_t nbytes, bool only)
{
	uint64_t size = direction == DMB_READ ? memory->size : file->size;
	struct expected expected = {calloc(1, size + 1), calloc(1, size + 1)};
	uint8_t *now = memory->bytes;

	CHECK(expected.value && expected.moved);
	expect(&expected, file, memory, segments, count, direction, nbytes);
	if (direction == DMB_WRITE) {
		now = malloc(size + 1);
		CHECK(now);
		CHECK_EQUAL(pread(file->plain, now, size + 1, 0), size);
	}
	for (uint64_t i = 0; i < size; i++) {
		uint8_t before = direction == DMB_READ ? POISON : file->bytes[i];
		bool is_new = now[i] == expected.value[i], is_old = now[i] == before;
		bool right = expected.moved[i] == 1   ? is_new
			     : expected.moved[i] == 2 ? is_old || (!only && is_new)
						      : is_old;

		if (!right)
			fprintf(stderr, "byte %#llx of the target, moved %d, nbytes %#llx: ",
				(unsigned long long)i, expected.moved[i],
				(unsigned long long)nbytes);
		CHECK(right);
	}
	if (direction == DMB_WRITE) {
		memcpy(file->bytes, now, size);
		free(now);
	}
	free(expected.value);
	free(expected.moved);
}

struct dmb_result transfer(struct dmb_ring *ring, const struct dmb_job *job,
			   const uint64_t *segments, size_t count)
{
	struct dmb_result result;
	struct dmb_batch *batch;
	int rc;

	CHECK_EQUAL(dmb_batch_create(ring, job, segments, count, &batch), 0);
	do
		rc = dmb_batch_run(batch, 100);
	while (rc == 1);
	CHECK_EQUAL(rc, 0);
	dmb_batch_get_result(batch, &result);
	dmb_batch_destroy(batch);
	return result;
}

void check_idle(struct dmb_ring *ring)
{
	CHECK_EQUAL(ring->ops->wait(ring, 0), 0);
	CHECK(!ring->ops->reap(ring));
	CHECK_EQUAL(ring->stage.free_count, ring->stage.count);
}
