/* SPDX-License-Identifier: MIT */
/*
 * A libze_loader.so.1 without a GPU: the functions that dmabuf calls, with the types and the
 * refusals of ze_api.h, and two of Intel's zex_driver.h.
 */
#define GPU_LEAD_BYTES 0
#include "fake_gpu.h"

#ifdef REAL_HEADER /* the test compares these declarations with those of libze-dev */
#include <level_zero/ze_api.h>
#endif

enum {
	OK = 0,
	NOT_READY = 1,
	OUT_OF_DEVICE_MEMORY = 0x70000003,
	UNSUPPORTED_FEATURE = 0x78000003,
	INVALID_ARGUMENT = 0x78000004,
	INVALID_HANDLE = 0x78000005,
	OVERLAPPING_REGIONS = 0x7800001a
};
enum { DMA_BUF = 2 };
enum {
	PROPERTIES = 0x3,
	EXTERNAL = 0xc,
	CONTEXT = 0xd,
	QUEUE = 0xe,
	POOL = 0x10,
	EVENT = 0x11,
	ALLOCATION = 0x15,
	ALLOCATED = 0x17,
	EXPORT = 0x18,
	IMPORT_FD = 0x19,
	EXPORT_FD = 0x1a
};

struct shared {
	int stype;
	struct shared *next;
	uint32_t flags;
	int fd;
};

struct device_properties {
	int stype;
	void *next;
	int type;
	uint32_t vendor, device, flags, subdevice, clock;
	uint64_t most_memory;
	uint32_t contexts, priority, threads, simd, eus, subslices, slices;
	uint64_t timer;
	uint32_t valid, kernel_valid;
	uint8_t uuid[16];
	char name[256];
};

struct external_properties {
	int stype;
	void *next;
	uint32_t imports, exports, image_imports, image_exports;
};

struct allocation_properties {
	int stype;
	struct shared *next;
	int type;
	uint64_t id, page_size;
};

struct allocation_desc {
	int stype;
	const struct shared *next;
	uint32_t flags, ordinal;
};

struct queue_desc {
	int stype;
	const void *next;
	uint32_t ordinal, index, flags;
	int mode, priority;
};

struct pool_desc {
	int stype;
	const void *next;
	uint32_t flags, count;
};

struct event_desc {
	int stype;
	const void *next;
	uint32_t index, signal, wait;
};

#ifdef REAL_HEADER
#define SAME(own, real) _Static_assert(sizeof(struct own) == sizeof(real), #own)
#define PLACE(own, field, real, theirs)                                                            \
	_Static_assert(offsetof(struct own, field) == offsetof(real, theirs), #own "." #field)
SAME(device_properties, ze_device_properties_t);
PLACE(device_properties, name, ze_device_properties_t, name);
SAME(external_properties, ze_device_external_memory_properties_t);
PLACE(external_properties, exports, ze_device_external_memory_properties_t,
      memoryAllocationExportTypes);
SAME(allocation_properties, ze_memory_allocation_properties_t);
SAME(allocation_desc, ze_device_mem_alloc_desc_t);
SAME(queue_desc, ze_command_queue_desc_t);
PLACE(queue_desc, mode, ze_command_queue_desc_t, mode);
SAME(pool_desc, ze_event_pool_desc_t);
SAME(event_desc, ze_event_desc_t);
SAME(shared, ze_external_memory_export_fd_t);
PLACE(shared, fd, ze_external_memory_import_fd_t, fd);
_Static_assert(EXPORT == ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_EXPORT_DESC, "");
_Static_assert(IMPORT_FD == ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_IMPORT_FD, "");
_Static_assert(EXPORT_FD == ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_EXPORT_FD, "");
_Static_assert(DMA_BUF == ZE_EXTERNAL_MEMORY_TYPE_FLAG_DMA_BUF, "");
_Static_assert(ALLOCATED == ZE_STRUCTURE_TYPE_MEMORY_ALLOCATION_PROPERTIES, "");
_Static_assert(ALLOCATION == ZE_STRUCTURE_TYPE_DEVICE_MEM_ALLOC_DESC, "");
_Static_assert(EXTERNAL == ZE_STRUCTURE_TYPE_DEVICE_EXTERNAL_MEMORY_PROPERTIES, "");
_Static_assert(PROPERTIES == ZE_STRUCTURE_TYPE_DEVICE_PROPERTIES, "");
_Static_assert(CONTEXT == ZE_STRUCTURE_TYPE_CONTEXT_DESC, "");
_Static_assert(QUEUE == ZE_STRUCTURE_TYPE_COMMAND_QUEUE_DESC, "");
_Static_assert(POOL == ZE_STRUCTURE_TYPE_EVENT_POOL_DESC, "");
_Static_assert(EVENT == ZE_STRUCTURE_TYPE_EVENT_DESC, "");
_Static_assert(INVALID_ARGUMENT == ZE_RESULT_ERROR_INVALID_ARGUMENT, "");
_Static_assert(OVERLAPPING_REGIONS == ZE_RESULT_ERROR_OVERLAPPING_REGIONS, "");
#else
#include <stddef.h>

static int driver, gpus[8], cpu, context, list;
int fake_exports = DMA_BUF, fake_has_zex = 1;

int zeInit(uint32_t flags)
{
	return flags ? INVALID_ARGUMENT : OK;
}

int zeDriverGet(uint32_t *count, void **ret)
{
	if (*count && ret)
		ret[0] = &driver;
	*count = 1;
	return OK;
}

/* A processor comes first, which is not a GPU. */
int zeDeviceGet(void *which, uint32_t *count, void **ret)
{
	if (which != &driver)
		return INVALID_HANDLE;
	for (uint32_t i = 0; ret && i < *count; i++)
		ret[i] = i ? &gpus[i - 1] : &cpu;
	*count = (uint32_t)fake_count + 1;
	return OK;
}

int zeDeviceGetProperties(void *device, struct device_properties *ret)
{
	if (ret->stype != PROPERTIES)
		return INVALID_ARGUMENT;
	ret->type = device == &cpu ? 2 : 1;
	snprintf(ret->name, sizeof(ret->name), "Fake GPU");
	return OK;
}

int zeDeviceGetExternalMemoryProperties(void *device, struct external_properties *ret)
{
	if (device != &gpus[0] || ret->stype != EXTERNAL)
		return INVALID_ARGUMENT;
	ret->imports = DMA_BUF | 1;
	ret->exports = (uint32_t)fake_exports;
	return OK;
}

int zeContextCreate(void *which, const struct queue_desc *about, void **ret)
{
	if (which != &driver || about->stype != CONTEXT)
		return INVALID_ARGUMENT;
	gpu_contexts++;
	*ret = &context;
	return OK;
}

int zeContextDestroy(void *which)
{
	gpu_contexts--;
	return which == &context ? OK : INVALID_HANDLE;
}

int zeMemAllocDevice(void *where, const struct allocation_desc *about, size_t size,
		     size_t alignment, void *device, void **ret)
{
	const struct shared *next = about->next;

	if (where != &context || device != &gpus[0] || about->stype != ALLOCATION || !size ||
	    alignment & (alignment - 1))
		return INVALID_ARGUMENT;
	if (next && (next->flags != DMA_BUF || (next->stype != EXPORT && next->stype != IMPORT_FD)))
		return INVALID_ARGUMENT;
	if (next && next->stype == IMPORT_FD)
		*ret = gpu_import(next->fd, size);
	else
		*ret = gpu_alloc(size);
	if (!*ret)
		return OUT_OF_DEVICE_MEMORY;
	gpu_find(*ret)->not_shared = !next;
	return OK;
}

int zeMemFree(void *where, void *address)
{
	if (where != &context)
		return INVALID_HANDLE;
	return gpu_free(address) ? INVALID_ARGUMENT : OK;
}

int zeMemGetAllocProperties(void *where, const void *address, struct allocation_properties *ret,
			    void **device)
{
	struct gpu_memory *one = gpu_find(address);

	if (where != &context || ret->stype != ALLOCATED)
		return INVALID_ARGUMENT;
	ret->type = one ? 2 : gpu_pinned(address, 1) >= 0;
	*device = one ? &gpus[fake_ordinal] : NULL;
	if (!ret->next)
		return OK;
	if (ret->next->stype != EXPORT_FD || ret->next->flags != DMA_BUF)
		return INVALID_ARGUMENT;
	ret->next->fd = gpu_export(address);
	return ret->next->fd < 0 ? UNSUPPORTED_FEATURE : OK;
}

int zeMemGetAddressRange(void *where, const void *address, void **base, size_t *size)
{
	struct gpu_memory *one = gpu_find(address);

	if (where != &context || !one)
		return INVALID_ARGUMENT;
	*base = one->start;
	*size = one->size;
	return OK;
}

static int import_pointer(void *which, void *address, size_t size)
{
	if (which != &driver || !size)
		return INVALID_ARGUMENT;
	return gpu_pin(address, size) ? OVERLAPPING_REGIONS : OK;
}

static int release_pointer(void *which, void *address)
{
	return which != &driver || gpu_unpin(address) ? INVALID_ARGUMENT : OK;
}

int zeDriverGetExtensionFunctionAddress(void *which, const char *name, void **ret)
{
	*ret = NULL;
	if (fake_has_zex && !strcmp(name, "zexDriverImportExternalPointer"))
		*ret = (void *)(uintptr_t)import_pointer;
	if (fake_has_zex && !strcmp(name, "zexDriverReleaseImportedPointer"))
		*ret = (void *)(uintptr_t)release_pointer;
	return which == &driver && *ret ? OK : INVALID_ARGUMENT;
}

int zeCommandListCreateImmediate(void *where, void *device, const struct queue_desc *about,
				 void **ret)
{
	if (where != &context || device != &gpus[0] || about->stype != QUEUE || about->mode != 2)
		return INVALID_ARGUMENT;
	gpu_queues++;
	*ret = &list;
	return OK;
}

int zeCommandListDestroy(void *which)
{
	if (gpu_flying())
		gpu_break("closed under a copy");
	gpu_queues--;
	return which == &list ? OK : INVALID_HANDLE;
}

int zeCommandListHostSynchronize(void *which, uint64_t timeout)
{
	if (which != &list || timeout)
		return INVALID_HANDLE;
	return gpu_idle() ? OK : NOT_READY;
}

int zeCommandListAppendMemoryCopy(void *which, void *to, const void *from, size_t size,
				  struct gpu_event *event, uint32_t waits, void **events)
{
	if (which != &list || waits || events || !event || event->copied)
		return INVALID_ARGUMENT;
	return gpu_copy(to, from, size, event) ? INVALID_ARGUMENT : OK;
}

int zeCommandQueueSynchronize(void *which, uint64_t timeout)
{
	if (!which || timeout)
		return INVALID_HANDLE;
	return gpu_caller_ready() ? OK : NOT_READY;
}

int zeEventPoolCreate(void *where, const struct pool_desc *about, uint32_t count, void **devices,
		      void **ret)
{
	if (where != &context || about->stype != POOL || about->flags != 1 || about->count != 1)
		return INVALID_ARGUMENT;
	gpu_queues++;
	*ret = &gpu_queues;
	return count || devices ? INVALID_ARGUMENT : OK;
}

int zeEventPoolDestroy(void *which)
{
	gpu_queues--;
	return which == &gpu_queues ? OK : INVALID_HANDLE;
}

int zeEventCreate(void *pool, const struct event_desc *about, void **ret)
{
	if (pool != &gpu_queues || about->stype != EVENT || about->index || about->signal != 4)
		return INVALID_ARGUMENT;
	*ret = gpu_new_event();
	return OK;
}

int zeEventDestroy(struct gpu_event *event)
{
	event->used = 0;
	return OK;
}

int zeEventHostReset(struct gpu_event *event)
{
	event->copied = 0;
	return OK;
}

int zeEventQueryStatus(struct gpu_event *event)
{
	if (!event->used || !event->copied)
		return INVALID_HANDLE;
	return gpu_occurred(event) ? OK : NOT_READY;
}
#endif
