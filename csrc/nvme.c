/* SPDX-License-Identifier: MIT */
/*
 * NVMe passthrough: commands of the NVM Command Set on a namespace's character device, /dev/ngXnY,
 * and the errno of each status code.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "internal.h"
#include "uapi.h"

enum {
	OPCODE_WRITE = 1,
	OPCODE_READ = 2,
	LBA_OUT_OF_RANGE = 0x080,
};

/* The bits above the code and its type: command retry delay, "more" and "do not retry". */
#define STATUS_CODE 0x7ffU
#define STATUS_DO_NOT_RETRY 0x4000U

void dmb_nvme_command(const struct dmb_io *io, struct dmb_nvme_cmd *ret)
{
	uint64_t lba = io->offset >> io->lba_shift;

	*ret = (struct dmb_nvme_cmd){
		.opcode = io->direction == DMB_READ ? OPCODE_READ : OPCODE_WRITE,
		.nsid = io->nsid,
		.addr = (uintptr_t)io->address,
		.data_len = io->length,
		.cdw10 = (uint32_t)lba,
		.cdw11 = (uint32_t)(lba >> 32),
		.cdw12 = (io->length >> io->lba_shift) - 1, /* 0 is one block; 16 bits */
	};
}

int32_t dmb_nvme_result(struct dmb_io *io, int answer)
{
	io->status = answer > 0 ? answer : 0;
	if (answer > 0)
		return dmb_nvme_errno((uint32_t)answer, io->direction);
	return answer ? answer : (int32_t)io->length;
}

int32_t dmb_nvme_execute(struct dmb_io *io)
{
	struct dmb_nvme_cmd command;
	int rc;

	dmb_nvme_command(io, &command);
	rc = ioctl(io->fd, DMB_NVME_IOCTL_IO_CMD, &command);
	return dmb_nvme_result(io, rc < 0 ? -errno : rc);
}

/*
 * NVM Express Base Specification 2.0, figures 94 to 98, and the NVM and Zoned Namespace Command Set
 * Specifications 1.1. EAGAIN: worth a retry unless the status has "do not retry".
 */
static const struct status {
	uint16_t code; /* the type, 3 bits, and the status code, 8 bits */
	uint16_t error;
	const char *name;
} table[] = {
	{0x001, EOPNOTSUPP, "invalid command opcode"},
	{0x002, EINVAL, "invalid field in command"},
	{0x004, EIO, "data transfer error"},
	{0x005, EIO, "aborted due to power loss"},
	{0x006, EIO, "internal error"},
	{0x007, EIO, "command abort requested"},
	{0x008, EIO, "aborted due to deletion of its queue"},
	{0x00b, ENODEV, "invalid namespace or format"},
	{0x00c, EIO, "command sequence error"},
	{0x013, EINVAL, "invalid PRP offset"},
	{0x015, EACCES, "operation denied"},
	{0x01c, EIO, "sanitize failed"},
	{0x01d, EBUSY, "sanitize in progress"},
	{0x020, EROFS, "namespace is write protected"},
	{0x021, EAGAIN, "command interrupted"},
	{0x022, EAGAIN, "transient transport error"},
	{LBA_OUT_OF_RANGE, ENOSPC, "LBA out of range"},
	{0x081, ENOSPC, "capacity exceeded"},
	{0x082, EAGAIN, "namespace not ready"},
	{0x083, EBUSY, "reservation conflict"},
	{0x084, EBUSY, "format in progress"},
	{0x180, EINVAL, "conflicting attributes"},
	{0x181, EILSEQ, "invalid protection information"},
	{0x182, EROFS, "attempted write to read-only range"},
	{0x183, EINVAL, "command size limit exceeded"},
	{0x1b8, EINVAL, "zoned boundary error"},
	{0x1b9, ENOSPC, "zone is full"},
	{0x1ba, EROFS, "zone is read-only"},
	{0x1bb, EIO, "zone is offline"},
	{0x1bc, EINVAL, "zone invalid write"},
	{0x1bd, EBUSY, "too many active zones"},
	{0x1be, EBUSY, "too many open zones"},
	{0x280, EIO, "write fault"},
	{0x281, EIO, "unrecovered read error"},
	{0x282, EILSEQ, "end-to-end guard check error"},
	{0x283, EILSEQ, "end-to-end application tag check error"},
	{0x284, EILSEQ, "end-to-end reference tag check error"},
	{0x286, EACCES, "access denied"},
	{0x287, ENODATA, "deallocated or unwritten logical block"},
	{0x300, EIO, "internal path error"},
	{0x301, ENOLINK, "asymmetric access persistent loss"},
	{0x302, ENOLINK, "asymmetric access inaccessible"},
	{0x303, EAGAIN, "asymmetric access transition"},
	{0x360, EIO, "controller pathing error"},
	{0x370, EIO, "host pathing error"},
	{0x371, EIO, "command aborted by host"},
};

static const struct status *find(uint32_t status)
{
	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
		if (table[i].code == (status & STATUS_CODE))
			return &table[i];
	return NULL;
}

int dmb_nvme_errno(uint32_t status, int direction)
{
	const struct status *found = find(status);

	if (!found)
		return -EIO;
	if (found->code == LBA_OUT_OF_RANGE && direction == DMB_READ)
		return -EINVAL; /* ENOSPC is for writes */
	if (found->error == EAGAIN && status & STATUS_DO_NOT_RETRY)
		return -EBUSY;
	return -found->error;
}

const char *dmb_nvme_status_name(uint32_t status)
{
	static const char *const types[] = {
		"unknown generic error",
		"unknown command-specific error",
		"unknown media or data integrity error",
		"unknown path error",
	};
	const struct status *found = find(status);
	uint32_t type = (status & STATUS_CODE) >> 8;

	if (found)
		return found->name;
	return type < sizeof(types) / sizeof(types[0]) ? types[type] : "vendor-specific error";
}
