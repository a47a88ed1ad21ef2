// SPDX-License-Identifier: MIT
/*
 * A VA-API driver in software, for tests: surfaces in udmabufs, imported and exported by
 * DRM_PRIME_2. Its one job copies a surface: vaBeginPicture names the target, a buffer of
 * vaRenderPicture the source, and a thread copies after vaEndPicture. Where TEST_VA_GATE names a
 * descriptor, the thread first reads 8 bytes from it, so that a test decides when the job ends.
 *
 * TEST_VA_OLD leaves out vaSyncSurface2; TEST_VA_COMPOSED refuses to export separate layers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/udmabuf.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <va/va_backend.h>
#include <va/va_drmcommon.h>

#define MOST 64
#define PITCH_UNIT 256
#define FOURCC(a, b, c, d)                                                                         \
	((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)

struct format {
	uint32_t fourcc, rt_format, drm, pixel;
	int planes;
	uint32_t layers[2];
};

static const struct format formats[] = {
	{VA_FOURCC_NV12,
	 VA_RT_FORMAT_YUV420,
	 FOURCC('N', 'V', '1', '2'),
	 1,
	 2,
	 {FOURCC('R', '8', ' ', ' '), FOURCC('G', 'R', '8', '8')}},
	{VA_FOURCC_P010,
	 VA_RT_FORMAT_YUV420_10,
	 FOURCC('P', '0', '1', '0'),
	 2,
	 2,
	 {FOURCC('R', '1', '6', ' '), FOURCC('G', 'R', '3', '2')}},
	{VA_FOURCC_BGRX,
	 VA_RT_FORMAT_RGB32,
	 FOURCC('X', 'R', '2', '4'),
	 4,
	 1,
	 {FOURCC('X', 'R', '2', '4')}},
};

struct surface {
	bool used, failed;
	int busy; /* jobs that use it */
	const struct format *format;
	uint32_t width, height, count;
	struct {
		int fd;
		uint32_t size;
		uint8_t *map;
	} objects[2];
	struct {
		uint32_t object, offset, pitch;
	} planes[2];
};

struct driver {
	pthread_mutex_t lock;
	pthread_cond_t done;
	struct surface surfaces[MOST];
	VASurfaceID target, source;
	int gate;
	bool composed;
};

struct job {
	struct driver *driver;
	struct surface *to, *from;
};

static struct driver *of(VADriverContextP ctx)
{
	return ctx->pDriverData;
}

static struct surface *find(VADriverContextP ctx, VASurfaceID id)
{
	struct surface *found = id < MOST ? &of(ctx)->surfaces[id] : NULL;

	return found && found->used ? found : NULL;
}

static uint32_t row_bytes(const struct surface *s)
{
	return s->width * s->format->pixel; /* of luma, and of interleaved chroma */
}

static uint32_t rows(const struct surface *s, int plane)
{
	return plane ? (s->height + 1) / 2 : s->height;
}

static void free_surface(struct surface *s)
{
	for (uint32_t i = 0; i < s->count; i++) {
		if (s->objects[i].map)
			munmap(s->objects[i].map, s->objects[i].size);
		if (s->objects[i].fd >= 0)
			close(s->objects[i].fd);
	}
	memset(s, 0, sizeof(*s));
}

static VAStatus map(struct surface *s, uint32_t i, int fd, uint32_t size)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	s->objects[i].fd = fd;
	s->objects[i].size = size;
	s->objects[i].map = at == MAP_FAILED ? NULL : at;
	s->count = i + 1;
	return at == MAP_FAILED ? VA_STATUS_ERROR_ALLOCATION_FAILED : VA_STATUS_SUCCESS;
}

static VAStatus allocate(struct surface *s)
{
	uint32_t pitch = (row_bytes(s) + PITCH_UNIT - 1) / PITCH_UNIT * PITCH_UNIT, size = 0;
	uint32_t page = sysconf(_SC_PAGESIZE);
	struct udmabuf_create create = {.flags = UDMABUF_FLAGS_CLOEXEC};
	int memory, device, fd = -1;

	for (int p = 0; p < s->format->planes; p++) {
		s->planes[p].offset = size;
		s->planes[p].pitch = pitch;
		size += pitch * rows(s, p);
	}
	size = (size + page - 1) / page * page;
	memory = memfd_create("va", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	device = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	if (memory >= 0 && device >= 0 && !ftruncate(memory, size) &&
	    !fcntl(memory, F_ADD_SEALS, F_SEAL_SHRINK)) {
		create.memfd = memory;
		create.size = size;
		fd = ioctl(device, UDMABUF_CREATE, &create);
	}
	close(memory);
	close(device);
	return fd < 0 ? VA_STATUS_ERROR_ALLOCATION_FAILED : map(s, 0, fd, size);
}

static VAStatus import(struct surface *s, const VADRMPRIMESurfaceDescriptor *from)
{
	int plane = 0;

	if (from->num_objects < 1 || from->num_objects > 2 || from->width != s->width ||
	    from->height != s->height)
		return VA_STATUS_ERROR_INVALID_PARAMETER;
	for (uint32_t i = 0; i < from->num_objects; i++) {
		int fd;
		VAStatus status;

		if (from->objects[i].drm_format_modifier) /* rows only */
			return VA_STATUS_ERROR_INVALID_PARAMETER;
		fd = fcntl(from->objects[i].fd, F_DUPFD_CLOEXEC, 0);
		if (fd < 0)
			return VA_STATUS_ERROR_INVALID_PARAMETER;
		status = map(s, i, fd, from->objects[i].size);
		if (status)
			return status;
	}
	for (uint32_t l = 0; l < from->num_layers; l++) {
		for (uint32_t p = 0; p < from->layers[l].num_planes && plane < 2; p++, plane++) {
			uint32_t object = from->layers[l].object_index[p];

			s->planes[plane].object = object;
			s->planes[plane].offset = from->layers[l].offset[p];
			s->planes[plane].pitch = from->layers[l].pitch[p];
			if (object >= s->count || s->planes[plane].pitch < row_bytes(s) ||
			    s->planes[plane].offset +
					    (uint64_t)s->planes[plane].pitch *
						    (rows(s, plane) - 1) +
					    row_bytes(s) >
				    s->objects[object].size)
				return VA_STATUS_ERROR_INVALID_PARAMETER;
		}
	}
	return plane == s->format->planes ? VA_STATUS_SUCCESS : VA_STATUS_ERROR_INVALID_PARAMETER;
}

static VAStatus create_surfaces2(VADriverContextP ctx, unsigned int rt_format, unsigned int width,
				 unsigned int height, VASurfaceID *ids, unsigned int count,
				 VASurfaceAttrib *attributes, unsigned int number)
{
	const VADRMPRIMESurfaceDescriptor *from = NULL;
	uint32_t fourcc = 0, memory = 0;
	VASurfaceID id = 0;
	struct surface *s;
	VAStatus status = VA_STATUS_ERROR_UNSUPPORTED_RT_FORMAT;

	if (count != 1)
		return VA_STATUS_ERROR_MAX_NUM_EXCEEDED;
	for (unsigned int i = 0; i < number; i++) {
		if (attributes[i].type == VASurfaceAttribPixelFormat)
			fourcc = attributes[i].value.value.i;
		else if (attributes[i].type == VASurfaceAttribMemoryType)
			memory = attributes[i].value.value.i;
		else if (attributes[i].type == VASurfaceAttribExternalBufferDescriptor)
			from = attributes[i].value.value.p;
	}
	if (memory == VA_SURFACE_ATTRIB_MEM_TYPE_VA)
		memory = 0;
	if (memory && (memory != VA_SURFACE_ATTRIB_MEM_TYPE_DRM_PRIME_2 || !from))
		return VA_STATUS_ERROR_UNSUPPORTED_MEMORY_TYPE;
	if (from)
		fourcc = from->fourcc;
	if (width > 4096 || height > 4096)
		return VA_STATUS_ERROR_RESOLUTION_NOT_SUPPORTED;
	pthread_mutex_lock(&of(ctx)->lock);
	while (id < MOST && of(ctx)->surfaces[id].used)
		id++;
	s = &of(ctx)->surfaces[id];
	for (size_t i = 0; id < MOST && i < sizeof(formats) / sizeof(*formats); i++) {
		if (formats[i].fourcc != fourcc || formats[i].rt_format != rt_format)
			continue;
		memset(s, 0, sizeof(*s));
		s->used = true;
		s->format = &formats[i];
		s->width = width;
		s->height = height;
		status = from ? import(s, from) : allocate(s);
		if (status)
			free_surface(s);
		*ids = id;
	}
	pthread_mutex_unlock(&of(ctx)->lock);
	return status;
}

static VAStatus sync2(VADriverContextP ctx, VASurfaceID id, uint64_t nanoseconds)
{
	struct surface *s = find(ctx, id);
	VAStatus status = VA_STATUS_SUCCESS;
	struct timespec until;

	if (!s)
		return VA_STATUS_ERROR_INVALID_SURFACE;
	clock_gettime(CLOCK_REALTIME, &until);
	if (nanoseconds > 1000000000000)
		nanoseconds = 1000000000000;
	until.tv_sec += (until.tv_nsec + nanoseconds) / 1000000000;
	until.tv_nsec = (until.tv_nsec + nanoseconds) % 1000000000;
	pthread_mutex_lock(&of(ctx)->lock);
	while (s->busy && !status)
		if (pthread_cond_timedwait(&of(ctx)->done, &of(ctx)->lock, &until) == ETIMEDOUT)
			status = s->busy ? VA_STATUS_ERROR_TIMEDOUT : VA_STATUS_SUCCESS;
	if (!status && s->failed) {
		s->failed = false;
		status = VA_STATUS_ERROR_DECODING_ERROR;
	}
	pthread_mutex_unlock(&of(ctx)->lock);
	return status;
}

static VAStatus sync_forever(VADriverContextP ctx, VASurfaceID id)
{
	return sync2(ctx, id, VA_TIMEOUT_INFINITE);
}

static VAStatus query_status(VADriverContextP ctx, VASurfaceID id, VASurfaceStatus *status)
{
	struct surface *s = find(ctx, id);

	if (!s)
		return VA_STATUS_ERROR_INVALID_SURFACE;
	pthread_mutex_lock(&of(ctx)->lock);
	*status = s->busy ? VASurfaceRendering : VASurfaceReady;
	pthread_mutex_unlock(&of(ctx)->lock);
	return VA_STATUS_SUCCESS;
}

static VAStatus destroy_surfaces(VADriverContextP ctx, VASurfaceID *ids, int count)
{
	for (int i = 0; i < count; i++) {
		struct surface *s = find(ctx, ids[i]);

		if (!s)
			return VA_STATUS_ERROR_INVALID_SURFACE;
		sync_forever(ctx, ids[i]);
		free_surface(s);
	}
	return VA_STATUS_SUCCESS;
}

static VAStatus export_surface(VADriverContextP ctx, VASurfaceID id, uint32_t type, uint32_t flags,
			       void *descriptor)
{
	VADRMPRIMESurfaceDescriptor *to = descriptor;
	struct surface *s = find(ctx, id);
	bool separate = flags & VA_EXPORT_SURFACE_SEPARATE_LAYERS;

	if (!s || (separate && of(ctx)->composed))
		return VA_STATUS_ERROR_INVALID_SURFACE;
	if (type != VA_SURFACE_ATTRIB_MEM_TYPE_DRM_PRIME_2)
		return VA_STATUS_ERROR_UNSUPPORTED_MEMORY_TYPE;
	memset(to, 0, sizeof(*to));
	to->fourcc = s->format->fourcc;
	to->width = s->width;
	to->height = s->height;
	to->num_objects = s->count;
	for (uint32_t i = 0; i < s->count; i++) {
		to->objects[i].fd = fcntl(s->objects[i].fd, F_DUPFD_CLOEXEC, 0);
		to->objects[i].size = s->objects[i].size;
	}
	to->num_layers = separate ? s->format->planes : 1;
	for (int p = 0; p < s->format->planes; p++) {
		uint32_t l = separate ? p : 0, n = separate ? 0 : p;

		to->layers[l].drm_format = separate ? s->format->layers[p] : s->format->drm;
		to->layers[l].num_planes = n + 1;
		to->layers[l].object_index[n] = s->planes[p].object;
		to->layers[l].offset[n] = s->planes[p].offset;
		to->layers[l].pitch[n] = s->planes[p].pitch;
	}
	return VA_STATUS_SUCCESS;
}

/* The job. */

static void copy(struct surface *to, const struct surface *from)
{
	for (int p = 0; p < from->format->planes; p++)
		for (uint32_t row = 0; row < rows(from, p); row++)
			memcpy(to->objects[to->planes[p].object].map + to->planes[p].offset +
				       (size_t)row * to->planes[p].pitch,
			       from->objects[from->planes[p].object].map + from->planes[p].offset +
				       (size_t)row * from->planes[p].pitch,
			       row_bytes(from));
}

static void *work(void *argument)
{
	struct job *job = argument;
	struct driver *driver = job->driver;
	uint64_t ticket;
	bool failed = false;

	if (driver->gate >= 0)
		failed = read(driver->gate, &ticket, sizeof(ticket)) != sizeof(ticket) ||
			 ticket == 2;
	if (!failed)
		copy(job->to, job->from);
	pthread_mutex_lock(&driver->lock);
	job->to->failed |= failed;
	job->to->busy--;
	job->from->busy--;
	pthread_cond_broadcast(&driver->done);
	pthread_mutex_unlock(&driver->lock);
	free(job);
	return NULL;
}

static VAStatus begin(VADriverContextP ctx, VAContextID context, VASurfaceID target)
{
	of(ctx)->target = target;
	return find(ctx, target) ? VA_STATUS_SUCCESS : VA_STATUS_ERROR_INVALID_SURFACE;
}

static VAStatus render(VADriverContextP ctx, VAContextID context, VABufferID *buffers, int count)
{
	return count == 1 ? VA_STATUS_SUCCESS : VA_STATUS_ERROR_INVALID_BUFFER;
}

static VAStatus end(VADriverContextP ctx, VAContextID context)
{
	struct surface *to = find(ctx, of(ctx)->target), *from = find(ctx, of(ctx)->source);
	struct job *job = malloc(sizeof(*job));
	pthread_t thread;

	if (!to || !from || to->format != from->format || to->width != from->width ||
	    to->height != from->height || !job) {
		free(job);
		return VA_STATUS_ERROR_INVALID_SURFACE;
	}
	*job = (struct job){of(ctx), to, from};
	pthread_mutex_lock(&of(ctx)->lock);
	to->busy++;
	from->busy++;
	pthread_mutex_unlock(&of(ctx)->lock);
	if (pthread_create(&thread, NULL, work, job))
		abort();
	return pthread_detach(thread) ? VA_STATUS_ERROR_UNKNOWN : VA_STATUS_SUCCESS;
}

static VAStatus create_buffer(VADriverContextP ctx, VAContextID context, VABufferType type,
			      unsigned int size, unsigned int count, void *data, VABufferID *id)
{
	if (size != sizeof(VASurfaceID) || count != 1)
		return VA_STATUS_ERROR_INVALID_BUFFER;
	memcpy(&of(ctx)->source, data, size);
	*id = 1;
	return VA_STATUS_SUCCESS;
}

static VAStatus destroy_buffer(VADriverContextP ctx, VABufferID id)
{
	return VA_STATUS_SUCCESS;
}

static VAStatus create_config(VADriverContextP ctx, VAProfile profile, VAEntrypoint entrypoint,
			      VAConfigAttrib *attributes, int count, VAConfigID *id)
{
	*id = 1;
	return VA_STATUS_SUCCESS;
}

static VAStatus destroy_config(VADriverContextP ctx, VAConfigID id)
{
	return VA_STATUS_SUCCESS;
}

static VAStatus create_context(VADriverContextP ctx, VAConfigID config, int width, int height,
			       int flag, VASurfaceID *targets, int count, VAContextID *id)
{
	*id = 1;
	return VA_STATUS_SUCCESS;
}

static VAStatus destroy_context(VADriverContextP ctx, VAContextID id)
{
	return VA_STATUS_SUCCESS;
}

static VAStatus query_profiles(VADriverContextP ctx, VAProfile *list, int *count)
{
	list[0] = VAProfileNone;
	*count = 1;
	return VA_STATUS_SUCCESS;
}

static VAStatus query_image_formats(VADriverContextP ctx, VAImageFormat *list, int *count)
{
	list[0] = (VAImageFormat){.fourcc = VA_FOURCC_NV12, .bits_per_pixel = 12};
	*count = 1;
	return VA_STATUS_SUCCESS;
}

static VAStatus terminate(VADriverContextP ctx)
{
	for (VASurfaceID id = 0; id < MOST; id++)
		if (find(ctx, id))
			destroy_surfaces(ctx, &id, 1);
	free(of(ctx));
	return VA_STATUS_SUCCESS;
}

static VAStatus no(VADriverContextP ctx)
{
	return VA_STATUS_ERROR_UNIMPLEMENTED;
}

VAStatus __vaDriverInit_1_0(VADriverContextP ctx);

__attribute__((visibility("default"))) VAStatus __vaDriverInit_1_0(VADriverContextP ctx)
{
	struct VADriverVTable *table = ctx->vtable;
	struct driver *driver = calloc(1, sizeof(*driver));
	const char *gate = getenv("TEST_VA_GATE");
	void **functions = (void **)table;

	if (!driver || getenv("TEST_VA_BROKEN"))
		return VA_STATUS_ERROR_OPERATION_FAILED;
	pthread_mutex_init(&driver->lock, NULL);
	pthread_cond_init(&driver->done, NULL);
	driver->gate = gate ? atoi(gate) : -1;
	driver->composed = getenv("TEST_VA_COMPOSED");
	ctx->pDriverData = driver;
	ctx->version_major = VA_MAJOR_VERSION;
	ctx->version_minor = VA_MINOR_VERSION;
	ctx->max_profiles = ctx->max_entrypoints = ctx->max_attributes = 1;
	ctx->max_image_formats = ctx->max_subpic_formats = 1;
	ctx->str_vendor = "a driver of tests";
	for (size_t i = 0; &functions[i] < (void **)&table->vaBufferInfo; i++)
		functions[i] = (void *)no; /* libva refuses a driver that lacks one of these */
	table->vaTerminate = terminate;
	table->vaQueryImageFormats = query_image_formats;
	table->vaQueryConfigProfiles = query_profiles;
	table->vaCreateConfig = create_config;
	table->vaDestroyConfig = destroy_config;
	table->vaCreateContext = create_context;
	table->vaDestroyContext = destroy_context;
	table->vaCreateBuffer = create_buffer;
	table->vaDestroyBuffer = destroy_buffer;
	table->vaBeginPicture = begin;
	table->vaRenderPicture = render;
	table->vaEndPicture = end;
	table->vaCreateSurfaces2 = create_surfaces2;
	table->vaDestroySurfaces = destroy_surfaces;
	table->vaSyncSurface = sync_forever;
	table->vaQuerySurfaceStatus = query_status;
	table->vaExportSurfaceHandle = export_surface;
	if (!getenv("TEST_VA_OLD"))
		table->vaSyncSurface2 = sync2;
	return VA_STATUS_SUCCESS;
}
