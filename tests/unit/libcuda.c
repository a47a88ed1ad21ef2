/* SPDX-License-Identifier: MIT */
/*
 * A libcuda.so.1 without a GPU, for the real cuda-bindings: the functions that dmabuf calls, over
 * host memory. A copy counts as in flight until it is queried for the second time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
	OK = 0,
	INVALID_VALUE = 1,
	OUT_OF_MEMORY = 2,
	INVALID_CONTEXT = 201,
	NOT_FOUND = 500,
	NOT_READY = 600
};
enum { ALREADY_REGISTERED = 712, NOT_REGISTERED = 713 };
enum { MOST = 64, DMA_BUF_SUPPORTED = 124 };

static int stream, depth, in_flight;
static uint64_t memory;
static size_t memory_size;
static void *pinned[MOST];

static int query(void)
{
	if (!in_flight)
		return OK;
	in_flight--;
	return NOT_READY;
}

static int copy(void *to, const void *from, size_t size)
{
	if (!depth)
		return INVALID_CONTEXT;
	memcpy(to, from, size);
	in_flight = 1;
	return OK;
}

int cuInit(unsigned int flags)
{
	return flags ? INVALID_VALUE : OK;
}

int cuDriverGetVersion(int *ret)
{
	*ret = 13000;
	return OK;
}

int cuDeviceGetCount(int *ret)
{
	*ret = 1;
	return OK;
}

int cuDeviceGet(int *ret, int ordinal)
{
	*ret = ordinal;
	return OK;
}

int cuDeviceGetName(char *ret, int size, int device)
{
	snprintf(ret, (size_t)size, "Test GPU %d", device);
	return OK;
}

int cuDeviceGetAttribute(int *ret, int key, int device)
{
	*ret = key == DMA_BUF_SUPPORTED && !device;
	return OK;
}

int cuDevicePrimaryCtxRetain(void **ret, int device)
{
	*ret = &depth;
	return device ? INVALID_VALUE : OK;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
	return device ? INVALID_VALUE : OK;
}

int cuCtxPushCurrent_v2(void *context)
{
	depth += context == &depth;
	return context == &depth ? OK : INVALID_VALUE;
}

int cuCtxPopCurrent_v2(void **ret)
{
	*ret = &depth;
	return depth-- ? OK : INVALID_CONTEXT;
}

int cuMemAlloc_v2(uint64_t *ret, size_t size)
{
	if (!depth)
		return INVALID_CONTEXT;
	if (size > 1ul << 40)
		return OUT_OF_MEMORY;
	memory = (uint64_t)(uintptr_t)mmap(NULL, size, PROT_READ | PROT_WRITE,
					   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memory_size = size;
	*ret = memory;
	return OK;
}

int cuMemFree_v2(uint64_t address)
{
	if (address != memory || in_flight)
		return INVALID_VALUE;
	munmap((void *)(uintptr_t)memory, memory_size);
	memory = 0;
	return OK;
}

int cuMemGetHandleForAddressRange(void *ret, uint64_t address, size_t size, int kind,
				  unsigned long long flags)
{
	if (kind != 1 || flags || (address | size) % 4096 || address < memory)
		return INVALID_VALUE;
	*(int *)ret = memfd_create("test export", MFD_CLOEXEC);
	return ftruncate(*(int *)ret, (off_t)size) ? INVALID_VALUE : OK;
}

static void **slot(const void *address)
{
	for (int i = 0; i < MOST; i++) {
		if (pinned[i] == address)
			return &pinned[i];
	}
	return NULL;
}

int cuMemHostRegister_v2(void *address, size_t size, unsigned int flags)
{
	if (!depth || !size || flags & ~2u)
		return INVALID_VALUE;
	if (slot(address))
		return ALREADY_REGISTERED;
	*slot(NULL) = address;
	return OK;
}

int cuMemHostUnregister(void *address)
{
	if (!slot(address))
		return NOT_REGISTERED;
	*slot(address) = NULL;
	return in_flight ? INVALID_VALUE : OK;
}

int cuMemHostGetDevicePointer_v2(uint64_t *ret, void *address, unsigned int flags)
{
	*ret = (uint64_t)(uintptr_t)address;
	return slot(address) && !flags ? OK : INVALID_VALUE;
}

int cuPointerGetAttribute(void *ret, int key, uint64_t address)
{
	if (!memory || address < memory || address >= memory + memory_size)
		return INVALID_VALUE;
	if (key == 2)
		*(unsigned int *)ret = 2;
	else if (key == 9)
		*(int *)ret = 0;
	else if (key == 11)
		*(uint64_t *)ret = memory;
	else if (key == 12)
		*(size_t *)ret = memory_size;
	else
		return INVALID_VALUE;
	return OK;
}

int cuFlushGPUDirectRDMAWrites(int target, int scope)
{
	return target || scope != 100 ? INVALID_VALUE : OK;
}

int cuStreamCreate(void **ret, unsigned int flags)
{
	*ret = &stream;
	return flags == 1 ? OK : INVALID_VALUE;
}

int cuStreamDestroy_v2(void *which)
{
	return which == &stream && !in_flight ? OK : INVALID_VALUE;
}

int cuStreamQuery(void *which)
{
	return which == &stream ? query() : INVALID_VALUE;
}

int cuEventCreate(void **ret, unsigned int flags)
{
	*ret = &in_flight;
	return flags == 2 ? OK : INVALID_VALUE;
}

int cuEventDestroy_v2(void *event)
{
	return event == &in_flight ? OK : INVALID_VALUE;
}

int cuEventRecord(void *event, void *which)
{
	return event == &in_flight && (!which || which == &stream) ? OK : INVALID_VALUE;
}

int cuEventQuery(void *event)
{
	return event == &in_flight ? query() : INVALID_VALUE;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *which)
{
	return which == &stream ? copy((void *)(uintptr_t)to, from, size) : INVALID_VALUE;
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *which)
{
	return which == &stream ? copy(to, (void *)(uintptr_t)from, size) : INVALID_VALUE;
}

int cuGetErrorName(int code, const char **ret)
{
	*ret = code == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OF_SOME_KIND";
	return OK;
}

int cuGetErrorString(int code, const char **ret)
{
	*ret = code == ALREADY_REGISTERED ? "already mapped" : "some error";
	return OK;
}

int cuGetProcAddress_v2(const char *name, void **ret, int version, uint64_t flags, int *status)
{
	char versioned[128];
	Dl_info self;
	void *library;

	(void)version;
	(void)flags;
	if (!dladdr((void *)(uintptr_t)cuInit, &self))
		return NOT_FOUND;
	library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
	snprintf(versioned, sizeof(versioned), "%s_v2", name);
	*ret = dlsym(library, versioned);
	if (!*ret)
		*ret = dlsym(library, name);
	if (status)
		*status = *ret ? 0 : 1;
	return *ret ? OK : NOT_FOUND;
}
