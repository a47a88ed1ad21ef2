/* SPDX-License-Identifier: MIT */
/* NVMe passthrough: the commands, what their answers mean, and where reads end. Needs no device. */
#include <fcntl.h>
#include <unistd.h>

#include "../batch.h"
#include "../uapi.h"
#include "test.h"

static void commands(void)
{
	struct dmb_io io = {
		.direction = DMB_WRITE,
		.nsid = 7,
		.lba_shift = 12,
		.address = (uint8_t *)0x7f0000001004,
		.length = 512 << 10,
		.offset = 0x123456789000ULL,
	};
	struct dmb_nvme_cmd command;
	uint8_t bytes[72] = {0};

	dmb_nvme_command(&io, &command);
	bytes[0] = 1;
	bytes[4] = 7;
	memcpy(bytes + 24, (uint8_t[]){0x04, 0x10, 0, 0, 0, 0x7f}, 6);
	memcpy(bytes + 36, (uint8_t[]){0, 0, 8}, 3);
	memcpy(bytes + 40, (uint8_t[]){0x89, 0x67, 0x45, 0x23, 1}, 5);
	bytes[48] = 127; /* 128 blocks */
	CHECK(!memcmp(bytes, &command, sizeof(command)));

	io.direction = DMB_READ;
	io.lba_shift = 9;
	io.length = 65536 << 9; /* the most that 16 bits can say */
	io.offset = INT64_MAX & ~511ULL;
	dmb_nvme_command(&io, &command);
	CHECK_EQUAL(command.opcode, 2);
	CHECK_EQUAL(command.cdw12, 0xffff);
	CHECK_EQUAL((uint64_t)command.cdw11 << 32 | command.cdw10, INT64_MAX >> 9);
}

static void answers(void)
{
	struct dmb_io io = {.direction = DMB_READ, .nsid = 1, .length = 4096, .status = 5};

	CHECK_EQUAL(dmb_nvme_result(&io, 0), 4096);
	CHECK_EQUAL(io.status, 0);
	CHECK_EQUAL(dmb_nvme_result(&io, 0x4281), -EIO);
	CHECK_EQUAL(io.status, 0x4281);
	CHECK_EQUAL(dmb_nvme_result(&io, -EFAULT), -EFAULT);
	CHECK_EQUAL(io.status, 0);
	CHECK_EQUAL(dmb_nvme_result(&io, 0x80), -EINVAL);
	io.direction = DMB_WRITE;
	CHECK_EQUAL(dmb_nvme_result(&io, 0x80), -ENOSPC);
	CHECK_EQUAL(dmb_nvme_result(&io, 0x82), -EAGAIN);
	CHECK_EQUAL(dmb_nvme_result(&io, 0x4082), -EBUSY); /* "do not retry" */
	CHECK_EQUAL(dmb_nvme_result(&io, 0x286), -EACCES);
	CHECK_EQUAL(dmb_nvme_result(&io, 0x7ff), -EIO);
	CHECK(!strcmp(dmb_nvme_status_name(0x4080), "LBA out of range"));
	CHECK(!strcmp(dmb_nvme_status_name(0x7c1), "vendor-specific error"));
	CHECK(!strcmp(dmb_nvme_status_name(0x2ff), "unknown media or data integrity error"));
	for (uint32_t status = 1; status < 0x8000; status++) {
		int error = dmb_nvme_errno(status, (int)(status & 1));

		CHECK(error < 0 && error != -ECANCELED && error != -EINTR);
		CHECK(*dmb_nvme_status_name(status));
	}
}

/* EINVAL without a status is of a namespace that has no usable path for a moment. */
static void again(void)
{
	struct dmb_batch batch = {.stop = UINT64_MAX};
	struct dmb_io io = {.batch = &batch, .nsid = 1};

	CHECK(dmb_may_reissue(&io, -EINVAL));
	CHECK(dmb_may_reissue(&io, -EAGAIN));
	CHECK(!dmb_may_reissue(&io, -EIO));
	batch.stopping = true;
	CHECK(!dmb_may_reissue(&io, -EINVAL));
	batch.stopping = false;
	io.status = 2;
	CHECK(!dmb_may_reissue(&io, -EINVAL));
	io.status = io.nsid = 0;
	CHECK(!dmb_may_reissue(&io, -EINVAL));
}

/* A command may not reach past the end of the namespace, and none is needed there. */
static void ends(void)
{
	struct dmb_job job = {
		.nsid = 1,
		.lba_shift = 9,
		.offset_align = 512,
		.memory_align = 4,
		.page = 512,
		.file_size = 10240,
		.size = 1 << 20,
		.base = 0x7f0000000000,
		.direction = DMB_READ,
		.route = DMB_DIRECT,
		.depth = 1,
		.block = 4096,
	};

	for (uint64_t offset = 0; offset < 12000; offset += 37) {
		for (uint64_t left = 1; left < 8000; left += 111) {
			uint64_t segment[3] = {offset, 4096, left};
			struct dmb_io io = {.left = left};

			dmb_cut_request(&job, segment, &io, false);
			CHECK_EQUAL(io.nsid, 1);
			CHECK_EQUAL(io.offset % 512, 0);
			CHECK_EQUAL(io.length % 512, 0);
			CHECK(io.length <= job.block);
			CHECK(!io.length || io.offset + io.length <= job.file_size);
			CHECK_EQUAL(!io.length, io.offset >= job.file_size);
		}
	}
}

/* A namespace that is not there: the kernel's answer, by either way, is the request's. */
static void refused(struct dmb_ring *ring)
{
	uint64_t segment[3] = {0, 0, 4096};
	struct memory memory;
	struct dmb_result result;
	struct dmb_job job = {
		.fd = open("/dev/zero", O_RDWR),
		.file_slot = -1,
		.plain_fd = -1,
		.nsid = 1,
		.lba_shift = 9,
		.offset_align = 512,
		.memory_align = 4,
		.page = 512,
		.file_size = 1 << 20,
		.direction = DMB_READ,
		.route = DMB_DIRECT,
		.depth = 4,
		.block = 4096,
	};

	memory_map(&memory, PAGE);
	job.base = (uintptr_t)memory.bytes;
	job.size = memory.size;
	result = transfer(ring, &job, segment, 1);
	CHECK_EQUAL(result.error, ring->info.backend == DMB_BACKEND_THREADS ? ENOTTY : EOPNOTSUPP);
	CHECK_EQUAL(result.nvme_status, 0);
	segment[0] = 1 << 20;
	result = transfer(ring, &job, segment, 1);
	CHECK_EQUAL(result.error, 0);
	CHECK_EQUAL(result.nbytes, 0);
	CHECK_EQUAL(result.short_segment, 0);
	memory_unmap(&memory);
	close(job.fd);
}

static void wide_ring(void)
{
	struct dmb_ring *ring;

	for (unsigned owned = 0; owned < 2; owned++) {
		int rc = dmb_ring_create(DMB_BACKEND_URING, 4, DMB_RING_PASSTHROUGH | owned, &ring);

		if (rc) {
			skip("no io_uring with SQE128 here: it needs Linux 5.19");
			continue;
		}
		CHECK(ring->info.setup_flags & IORING_SETUP_SQE128);
		CHECK(ring->info.setup_flags & IORING_SETUP_CQE32);
		refused(ring);
		check_idle(ring);
		dmb_ring_destroy(ring);
	}
	CHECK_EQUAL(dmb_ring_create(DMB_BACKEND_THREADS, 2, 0, &ring), 0);
	refused(ring);
	dmb_ring_destroy(ring);
}

int main(void)
{
	commands();
	answers();
	again();
	ends();
	wide_ring();
	return finish();
}
