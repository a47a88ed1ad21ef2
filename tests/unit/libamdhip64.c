/* SPDX-License-Identifier: MIT */
/*
 * A libamdhip64.so and libhsa-runtime64.so.1 without a GPU: the functions that dmabuf calls, with
 * the types and the refusals of hip_runtime_api.h and hsa_ext_amd.h (ROCm 6).
 */
#define GPU_LEAD_BYTES 4096
#include "fake_gpu.h"

enum {
	OK = 0,
	INVALID_VALUE = 1,
	OUT_OF_MEMORY = 2,
	NO_DEVICE = 100,
	INVALID_DEVICE = 101,
	INVALID_HANDLE = 400,
	NOT_FOUND = 500,
	NOT_READY = 600,
	NOT_REGISTERED = 713
};

struct handle_desc {
	int type;
	union {
		int fd;
		struct {
			void *handle;
			const void *name;
		} win32;
	} handle;
	unsigned long long size;
	unsigned int flags;
	unsigned int reserved[16];
};

struct buffer_desc {
	unsigned long long offset, size;
	unsigned int flags;
	unsigned int reserved[16];
};

static int stream;
static _Thread_local int current;
uint32_t fake_flushed;
int fake_flushes = 1;

int hipInit(unsigned int flags)
{
	return flags ? INVALID_VALUE : OK;
}

int hipGetDeviceCount(int *ret)
{
	*ret = fake_count;
	return fake_count ? OK : NO_DEVICE;
}

int hipDeviceGet(int *ret, int ordinal)
{
	*ret = ordinal;
	return ordinal < fake_count ? OK : INVALID_DEVICE;
}

int hipDeviceGetName(char *ret, int size, int device)
{
	(void)device;
	snprintf(ret, (size_t)size, "Fake GPU");
	return OK;
}

int hipDeviceGetAttribute(void *ret, int key, int device)
{
	if (key != 10005 || device)
		return INVALID_VALUE;
	*(uint32_t **)ret = fake_flushes ? &fake_flushed : NULL;
	return OK;
}

int hipGetDevice(int *ret)
{
	*ret = current;
	return OK;
}

int hipSetDevice(int device)
{
	current = device;
	return device < 8 ? OK : INVALID_DEVICE;
}

int hipMalloc(void **ret, size_t size)
{
	if (current)
		return INVALID_DEVICE;
	*ret = gpu_alloc(size);
	return *ret ? OK : OUT_OF_MEMORY;
}

int hipFree(void *address)
{
	struct gpu_memory *one = gpu_find(address);

	if (!address)
		return OK;
	if (one && one->imported) {
		one->mapped--;
		return OK;
	}
	return gpu_free(address) ? INVALID_VALUE : OK;
}

int hipPointerGetAttribute(void *ret, int key, void *address)
{
	int device = gpu_find(address) != NULL;

	if (!device && gpu_pinned(address, 1) < 0)
		return INVALID_VALUE;
	if (key != 2 && key != 9)
		return INVALID_VALUE;
	*(int *)ret = key == 2 ? 1 + device : fake_ordinal;
	return OK;
}

int hipMemGetAddressRange(void **base, size_t *size, void *address)
{
	struct gpu_memory *one = gpu_find(address);

	*base = one ? one->start : NULL;
	*size = one ? one->size : 0;
	return one || gpu_pinned(address, 1) >= 0 ? OK : NOT_FOUND;
}

int hsa_amd_portable_export_dmabuf(const void *address, size_t size, int *fd, uint64_t *offset)
{
	struct gpu_memory *one = gpu_find(address);

	if (!one || !size)
		return 0x1001;
	*fd = gpu_export(address);
	*offset = (uint64_t)((const char *)address - one->mapping);
	return *fd < 0 ? 0x1000 : OK;
}

int hipImportExternalMemory(void **ret, const struct handle_desc *about)
{
	if (about->type != 1 || about->flags || !about->size)
		return INVALID_VALUE;
	*ret = gpu_import(about->handle.fd, about->size);
	return *ret ? OK : OUT_OF_MEMORY;
}

int hipExternalMemoryGetMappedBuffer(void **ret, void *memory, const struct buffer_desc *about)
{
	struct gpu_memory *one = gpu_find(memory);

	if (!one || about->flags || about->offset + about->size > one->size)
		return INVALID_VALUE;
	*ret = one->start + about->offset;
	one->mapped++;
	return OK;
}

/* The import and each mapping hold the memory, as in ihipFree of clr: here the mappings go first.
 */
int hipDestroyExternalMemory(void *memory)
{
	if (gpu_find(memory)->mapped)
		gpu_break("an import that is mapped was destroyed");
	return gpu_free(memory) ? INVALID_VALUE : OK;
}

int hipHostRegister(void *address, size_t size, unsigned int flags)
{
	if (!size || flags & ~2u)
		return INVALID_VALUE;
	return gpu_pin(address, size) ? INVALID_VALUE : OK;
}

int hipHostUnregister(void *address)
{
	return gpu_unpin(address) ? NOT_REGISTERED : OK;
}

int hipHostGetDevicePointer(void **ret, void *address, unsigned int flags)
{
	*ret = address;
	return gpu_pinned(address, 1) < 0 || flags ? INVALID_VALUE : OK;
}

int hipStreamCreateWithFlags(void **ret, unsigned int flags)
{
	gpu_queues++;
	*ret = &stream;
	return flags == 1 ? OK : INVALID_VALUE;
}

int hipStreamDestroy(void *which)
{
	if (gpu_flying())
		gpu_break("closed under a copy");
	gpu_queues--;
	return which == &stream ? OK : INVALID_HANDLE;
}

int hipStreamQuery(void *which)
{
	if (which != &stream)
		return INVALID_HANDLE;
	return gpu_idle() ? OK : NOT_READY;
}

int hipEventCreateWithFlags(void **ret, unsigned int flags)
{
	*ret = gpu_new_event();
	return flags == 2 ? OK : INVALID_VALUE;
}

int hipEventDestroy(struct gpu_event *event)
{
	event->used = 0;
	return OK;
}

int hipEventRecord(struct gpu_event *event, void *which)
{
	event->copied = which == &stream ? gpu_begun : 0;
	return OK;
}

int hipEventQuery(struct gpu_event *event)
{
	if (!event->used)
		return INVALID_HANDLE;
	return gpu_occurred(event) ? OK : NOT_READY;
}

int hipMemcpyHtoDAsync(void *to, void *from, size_t size, void *which)
{
	if (which != &stream || !gpu_find(to))
		return INVALID_VALUE;
	return gpu_copy(to, from, size, NULL) ? INVALID_VALUE : OK;
}

int hipMemcpyDtoHAsync(void *to, void *from, size_t size, void *which)
{
	if (which != &stream || !gpu_find(from))
		return INVALID_VALUE;
	return gpu_copy(to, from, size, NULL) ? INVALID_VALUE : OK;
}

const char *hipGetErrorName(int code)
{
	return code == OUT_OF_MEMORY ? "hipErrorOutOfMemory" : "hipErrorOfSomeKind";
}

const char *hipGetErrorString(int code)
{
	return code == 700 ? "illegal address" : "some error";
}
