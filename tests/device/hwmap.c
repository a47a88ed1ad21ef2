// SPDX-License-Identifier: MIT
/*
 * FFmpeg's av_hwframe_map, which its filter hwmap calls, in both directions: a Buffer as a DRM
 * PRIME frame mapped to a VA-API surface, and a VA-API surface of FFmpeg's pool mapped to a DRM
 * PRIME frame. test_vaapi.py calls this by ctypes.
 */
#include <libavutil/error.h>
#include <libavutil/frame.h>
#include <libavutil/hwcontext.h>
#include <libavutil/hwcontext_drm.h>
#include <libavutil/hwcontext_vaapi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define DRM_FORMAT_NV12 0x3231564e

struct mapped {
	void *display;
	uint32_t imported, own; /* numbers of surfaces */
	int fd;
	long offset[2], pitch[2];
};

struct hwmap {
	AVBufferRef *drm, *va, *prime_frames, *derived_frames, *own_frames;
	AVFrame *prime, *imported, *own, *exported;
	AVDRMFrameDescriptor descriptor;
};

static void keep(void *opaque, uint8_t *data)
{
}

static int frames(AVBufferRef *device, enum AVPixelFormat format, int width, int height,
		  AVBufferRef **ret)
{
	AVHWFramesContext *context;

	*ret = av_hwframe_ctx_alloc(device);
	if (!*ret)
		return AVERROR(ENOMEM);
	context = (AVHWFramesContext *)(*ret)->data;
	context->format = format;
	context->sw_format = AV_PIX_FMT_NV12;
	context->width = width;
	context->height = height;
	return av_hwframe_ctx_init(*ret);
}

void hwmap_close(struct hwmap *m)
{
	AVFrame **each[] = {&m->exported, &m->own, &m->imported, &m->prime};
	AVBufferRef **refs[] = {&m->own_frames, &m->derived_frames, &m->prime_frames, &m->va,
				&m->drm};

	for (int i = 0; i < 4; i++)
		av_frame_free(each[i]);
	for (int i = 0; i < 5; i++)
		av_buffer_unref(refs[i]);
	free(m);
}

#define TRY(call)                                                                                  \
	if ((rc = (call)) < 0) {                                                                   \
		snprintf(error, 128, "%.60s: %s", #call, av_err2str(rc));                          \
		hwmap_close(m);                                                                    \
		return NULL;                                                                       \
	}

struct hwmap *hwmap_open(const char *node, int width, int height, long size,
			 const struct mapped *from, struct mapped *to, char *error)
{
	struct hwmap *m = calloc(1, sizeof(*m));
	AVDRMFrameDescriptor *d;
	int rc;

	if (!m)
		return NULL;
	m->prime = av_frame_alloc();
	m->imported = av_frame_alloc();
	m->own = av_frame_alloc();
	m->exported = av_frame_alloc();
	TRY(av_hwdevice_ctx_create(&m->va, AV_HWDEVICE_TYPE_VAAPI, node, NULL, 0));
	TRY(av_hwdevice_ctx_create(&m->drm, AV_HWDEVICE_TYPE_DRM, node, NULL, 0));
	to->display = ((AVVAAPIDeviceContext *)((AVHWDeviceContext *)m->va->data)->hwctx)->display;

	TRY(frames(m->drm, AV_PIX_FMT_DRM_PRIME, width, height, &m->prime_frames));
	TRY(av_hwframe_ctx_create_derived(&m->derived_frames, AV_PIX_FMT_VAAPI, m->va,
					  m->prime_frames, AV_HWFRAME_MAP_DIRECT));
	m->descriptor = (AVDRMFrameDescriptor){
		.nb_objects = 1,
		.objects = {{.fd = from->fd, .size = size}},
		.nb_layers = 1,
		.layers = {{DRM_FORMAT_NV12,
			    2,
			    {{0, from->offset[0], from->pitch[0]},
			     {0, from->offset[1], from->pitch[1]}}}},
	};
	m->prime->format = AV_PIX_FMT_DRM_PRIME;
	m->prime->width = width;
	m->prime->height = height;
	m->prime->hw_frames_ctx = av_buffer_ref(m->prime_frames);
	m->prime->data[0] = (uint8_t *)&m->descriptor;
	m->prime->buf[0] =
		av_buffer_create(m->prime->data[0], sizeof(m->descriptor), keep, NULL, 0);
	m->imported->format = AV_PIX_FMT_VAAPI;
	m->imported->hw_frames_ctx = av_buffer_ref(m->derived_frames);
	TRY(av_hwframe_map(m->imported, m->prime, AV_HWFRAME_MAP_READ | AV_HWFRAME_MAP_WRITE));
	to->imported = (uintptr_t)m->imported->data[3];

	TRY(frames(m->va, AV_PIX_FMT_VAAPI, width, height, &m->own_frames));
	TRY(av_hwframe_get_buffer(m->own_frames, m->own, 0));
	to->own = (uintptr_t)m->own->data[3];
	m->exported->format = AV_PIX_FMT_DRM_PRIME;
	TRY(av_hwframe_map(m->exported, m->own, AV_HWFRAME_MAP_READ | AV_HWFRAME_MAP_WRITE));
	d = (AVDRMFrameDescriptor *)m->exported->data[0];
	to->fd = d->objects[0].fd;
	for (int i = 0; i < 2; i++) { /* FFmpeg exports NV12 as two layers of one plane each */
		to->offset[i] = d->layers[i].planes[0].offset;
		to->pitch[i] = d->layers[i].planes[0].pitch;
	}
	return m;
}
