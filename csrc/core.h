/* SPDX-License-Identifier: MIT */
/*
 * The C core's whole API. cffi reads the same declarations (csrc/build_ffi.py strips the
 * preprocessor lines), so this file keeps to what both compilers understand.
 *
 * Every function that can fail returns 0 or a count, or -errno; an out-parameter comes last and is
 * called ret. Nothing here is global and nothing locks: a ring and its batches belong to one thread
 * at a time, which the caller sees to. Only dmb_ring_register_buffer and dmb_ring_register_file may
 * be called beside a running batch, from any thread, on a ring made without DMB_RING_SINGLE_ISSUER.
 */
#ifndef DMABUF_CORE_H
#define DMABUF_CORE_H

#include <stddef.h>
#include <stdint.h>

struct dmb_ring;  /* an io_uring ring, or a thread backend that takes the same requests */
struct dmb_batch; /* an array of segments on its way through a ring */

enum dmb_backend {
	DMB_BACKEND_URING = 0,
	DMB_BACKEND_THREADS =
		1, /* `depth` worker threads; 0 of them: each request at once, in place */
};

enum dmb_ring_flags {
	DMB_RING_SINGLE_ISSUER = 1,  /* with DEFER_TASKRUN: one thread owns the ring */
	DMB_RING_EMULATE_NATIVE = 2, /* threads only, for tests: DMB_NATIVE by mapping dma-bufs */
	DMB_RING_PASSTHROUGH = 4,    /* SQE128 and CQE32, for jobs with a nsid */
};

/* The file tables of a ring: how many buffers and files may be registered at once. */
#define DMB_BUFFER_SLOTS 4096
#define DMB_FILE_SLOTS 512

/* What a ring turned out to have. */
struct dmb_ring_info {
	int32_t backend;
	uint32_t depth;
	uint32_t setup_flags; /* IORING_SETUP_* that the kernel took */
	uint32_t features;    /* IORING_FEAT_* */
	int32_t buffer_table; /* 0, or -errno: why buffers cannot be registered */
	int32_t file_table;   /* 0, or -errno: why files cannot be registered */
};

int dmb_ring_create(int backend, unsigned depth, unsigned flags, struct dmb_ring **ret);
void dmb_ring_destroy(struct dmb_ring *ring);
void dmb_ring_get_info(const struct dmb_ring *ring, struct dmb_ring_info *ret);
/* Pin [address, address + size) into a slot; size 0 clears the slot. */
int dmb_ring_register_buffer(struct dmb_ring *ring, unsigned slot, uint64_t address, uint64_t size);
/*
 * Whether the kernel has dma-buf registered buffers, by an update that changes nothing: 0, or
 * -errno (-EINVAL from kernels without).
 */
int dmb_ring_probe_native(struct dmb_ring *ring);
/*
 * Register a dma-buf for I/O with the open file target_fd; dmabuf_fd -1 clears the slot. Requests
 * with the slot give an offset into the dma-buf for an address, and only to that open file.
 */
int dmb_ring_register_dmabuf(struct dmb_ring *ring, unsigned slot, int dmabuf_fd, int target_fd);
/* Put a file into a slot; fd -1 clears the slot. */
int dmb_ring_register_file(struct dmb_ring *ring, unsigned slot, int fd);
/*
 * Have the kernel do what it has put off until the ring's owner comes by (DEFER_TASKRUN). The last
 * reference to a request's file may be among it, and the file's device stays busy until then.
 */
void dmb_ring_settle(struct dmb_ring *ring);

enum dmb_direction {
	DMB_READ = 0,  /* file to buffer */
	DMB_WRITE = 1, /* buffer to file */
};

enum dmb_route {
	DMB_DIRECT = 1,	  /* O_DIRECT into the buffer's own pages */
	DMB_STAGED = 2,	  /* O_DIRECT into staging blocks, the CPU from there */
	DMB_BUFFERED = 3, /* the page cache, straight into the mapping */
	DMB_NATIVE = 4,	  /* O_DIRECT through dma-bufs registered with the ring, one a slot */
};

/*
 * A lane is what is known of one open file and one buffer that lets a lone small request go between
 * them with no more thought: by one pread(2) or pwrite(2), for which a ring gains nothing.
 */
struct dmb_lane {
	int32_t fd;	       /* with O_DIRECT */
	int32_t direction;     /* enum dmb_direction */
	uint32_t unit;	       /* of file offsets and sizes, a power of two */
	uint32_t memory_align; /* of memory addresses, a power of two */
	uint64_t most;	       /* bytes of a request */
	uint64_t base;	       /* address of the buffer's first byte */
	uint64_t size;	       /* of the buffer, in bytes */
	uint64_t file_size;    /* of a device; 0 for a file, which is asked each time */
	const int32_t *slabs;  /* dma-bufs whose fences are looked at; NULL for none */
	uint64_t slab_size;    /* bytes of each but the last */
	uint32_t stale_cache;  /* as in the job */
};
/*
 * Move `size` bytes between the file's `offset` and the buffer's `start`. 1 where all of it was
 * moved; 0 where the lane does not take it (an edge, the end of the file, a fence that has not
 * signalled, an error, a short count): the long way finds out which. Nothing is waited for but
 * the device.
 */
int dmb_lane_move(const struct dmb_lane *lane, uint64_t offset, uint64_t start, uint64_t size,
		  int fence);

struct dmb_job {
	/* the file */
	int32_t fd;	   /* O_DIRECT for DMB_DIRECT and DMB_STAGED, without for DMB_BUFFERED */
	int32_t file_slot; /* the registered slot of fd, or -1 */
	int32_t edge_fd;   /* without O_DIRECT: the edges of a write; -1 where there are none */
	uint32_t offset_align; /* of file offsets and lengths, a power of two */
	uint32_t memory_align; /* of memory addresses, a power of two */
	uint32_t page;	    /* the page size: what the edges of a write are cut at, if it has any */
	uint64_t file_size; /* in bytes: a read never goes straight into the buffer past its last
			       whole block */
	/* the buffer */
	uint64_t base;	      /* address of its first byte */
	uint64_t size;	      /* in bytes */
	const int32_t *slots; /* registered slot, or -1, of each slot_size bytes; NULL for none */
	uint64_t slot_size;   /* on DMB_NATIVE, bytes of each dma-buf but the last */
	/* how */
	int32_t direction;
	int32_t route;
	uint32_t depth; /* requests in flight at most */
	uint32_t block; /* bytes a request at most, a multiple of both alignments */
	/* 1 where the kernel takes no request for fd without a thread of its own that waits: then
	   several such threads are asked for, which it does not start by itself while one computes
	 */
	uint32_t by_workers;
	/* 1 where fd's file is nothing but page cache (tmpfs): then one such thread of the kernel's
	   copies all, unless several are asked for */
	uint32_t in_memory;
	/* 1 where the kernel may leave the page cache alone when an asynchronous O_DIRECT write of
	   fd is done (block devices, FUSE): then the batch drops the written range from it */
	uint32_t stale_cache;
	/* where fd is an NVMe namespace's character device; 0 elsewhere. io_uring needs a ring made
	   with DMB_RING_PASSTHROUGH. file_size and a write's segments are multiples of the block,
	   which is offset_align, and so is `page` */
	uint32_t nsid;
	uint32_t lba_shift; /* the namespace's block is 1 << lba_shift bytes */
	/* NULL, or for each segment that has bytes the nanoseconds of its last request, from being
	   made to being handled: there is one where neither block nor alignments cut the segment */
	uint64_t *latencies;
};

struct dmb_result {
	uint64_t nbytes;   /* bytes moved without a gap, counted from the first segment's start */
	uint64_t copied;   /* bytes the CPU touched */
	uint64_t straight; /* bytes moved by the device between file and buffer */
	uint64_t requests; /* completed requests */
	uint64_t reissues; /* requests issued again after EAGAIN or EINTR */
	int32_t error;	   /* 0, or the errno of the first request that failed; EBUSY where the
			      page cache keeps old bytes of a range that was written */
	int32_t failed_straight; /* 1 where that request was one of `straight` */
	uint64_t error_offset;	 /* file offset of the first byte that could not be moved */
	int64_t short_segment; /* index of the first segment that met the end of the file, or -1 */
	uint32_t nvme_status;  /* what an NVMe device said with `error`, or 0 */
};

/*
 * Segments are triples (file offset, buffer offset, size), in bytes. Returns 0; or -ERANGE where
 * one leaves the file range 0..2^63-1 or the buffer's `size`, or -EEXIST where two of a write
 * overlap in the file, with the offending index in *ret.
 */
int dmb_segments_check(const uint64_t *segments, size_t count, uint64_t size, int direction,
		       size_t *ret);

/*
 * Checked segments, each that continues the one before it in the file and in the buffer joined with
 * that, and those without bytes left out: a request of the device each costs more than the bytes.
 * Returns how many there are, and writes them to ret (room for `count`) unless that is NULL.
 */
size_t dmb_segments_join(const uint64_t *segments, size_t count, uint64_t *ret);

/* What checked segments reach from and to; all 0 where none has a size. */
struct dmb_bounds {
	uint64_t nbytes;
	uint64_t file_start, file_end;
	uint64_t buffer_start, buffer_end;
};
void dmb_segments_bounds(const uint64_t *segments, size_t count, struct dmb_bounds *ret);

/*
 * How many of the segments have nothing for the job's route: on DMB_DIRECT no byte that could go
 * straight between file and buffer, on DMB_STAGED no whole page that a write could send.
 */
size_t dmb_segments_without_middle(const struct dmb_job *job, const uint64_t *segments,
				   size_t count);
/* How many of the segments have bytes that cannot go straight, and so go through the CPU. */
size_t dmb_segments_with_edges(const struct dmb_job *job, const uint64_t *segments, size_t count);

/* The job, its slots and the segments are read until the batch is destroyed. */
int dmb_batch_create(struct dmb_ring *ring, const struct dmb_job *job, const uint64_t *segments,
		     size_t count, struct dmb_batch **ret);
/* Work for at most timeout_ms. 1: there is more to do; 0: done, see the result; or -errno. */
int dmb_batch_run(struct dmb_batch *batch, int timeout_ms);
/* Submit nothing more, cancel what can be cancelled, return when nothing is in flight. */
void dmb_batch_drain(struct dmb_batch *batch);
void dmb_batch_get_result(const struct dmb_batch *batch, struct dmb_result *ret);
void dmb_batch_destroy(struct dmb_batch *batch); /* drains */

/*
 * Many batches on one ring, driven by an event loop: none of these waits for a device.
 *
 * A batch that was started makes its requests at dmb_ring_poll, no more of all batches together
 * than the ring's depth, and the batches take turns. The eventfd (-1 for none) is signalled when
 * dmb_ring_poll has something to do. That submits what there is in one system call, takes what has
 * completed, and adds the batches that are done to done[*ret], counting *ret up to `capacity`;
 * where it gets there, call it again. Reads *ret, so an interrupted caller loses none.
 */
struct dmb_done {
	uint64_t tag;
	uint64_t nbytes; /* moved without a gap */
};
int dmb_ring_set_eventfd(struct dmb_ring *ring, int fd);
int dmb_ring_poll(struct dmb_ring *ring, struct dmb_done *done, uint32_t capacity, uint32_t *ret);
void dmb_batch_start(struct dmb_batch *batch, uint64_t tag);
/* Submit nothing more and cancel what can be cancelled; dmb_ring_poll tells when it is done. */
void dmb_batch_stop(struct dmb_batch *batch);
/*
 * A batch of one request, made and started; 0, 1 where the lane does not take it, or -errno. The
 * ring owns it, and destroys it when dmb_ring_poll tells that it is done. Until then it is known by
 * its tag, which no other such batch has; another tag does nothing. Draining it, it is not told of
 * any more.
 */
int dmb_batch_start_lone(struct dmb_ring *ring, const struct dmb_lane *lane, uint64_t offset,
			 uint64_t start, uint64_t size, int fence, uint64_t tag);
int dmb_ring_stop_lone(struct dmb_ring *ring, uint64_t tag); /* 1 for a known one, or 0 */
void dmb_ring_drain_lone(struct dmb_ring *ring, uint64_t tag);
/* The bytes that a batch moved without a gap once it is done; 0 before. */
uint64_t dmb_batch_nbytes(const struct dmb_batch *batch);

/* What an NVMe status means, with or without its bits above the code: errno, and in words. */
int dmb_nvme_errno(uint32_t status, int direction);
const char *dmb_nvme_status_name(uint32_t status);

/*
 * The seam for tests: `filter` sees every completion before the batch does, and what it returns
 * takes the result's place. It is called with the ring's user, never from a worker thread.
 */
struct dmb_completion {
	int32_t direction;
	int32_t straight; /* between file and buffer, without a staging block */
	uint64_t offset;  /* in the file */
	uint32_t size;
	int32_t result;
};
typedef int32_t (*dmb_filter)(void *arg, const struct dmb_completion *completion);
void dmb_ring_set_filter(struct dmb_ring *ring, dmb_filter filter, void *arg);

/*
 * Memory as a file, by FUSE: a file system that is one file and is mounted nowhere. It is gone with
 * the last descriptor of the file, and dmb_fuse_serve returns.
 */
struct dmb_fuse_slab {
	void *memory;
	uint64_t size;
	int32_t dmabuf; /* whose fences and caches are seen to; -1: none */
};
enum dmb_fuse_step {
	DMB_FUSE_DEVICE = 0,	 /* opening /dev/fuse */
	DMB_FUSE_NAMESPACES = 1, /* making namespaces of its own, where this user may not mount */
	DMB_FUSE_MOUNT = 2,
};
/*
 * Makes it, perhaps in namespaces of its own that the process stays in: 0 or -errno, and what was
 * refused in *ret_step. *ret_device is what dmb_fuse_serve answers, and *ret_root the file as
 * O_PATH has it: any process of this user opens it by /proc/self/fd. Its size is asked for at the
 * first fstat(2) or lseek(2) to the end, and what is mapped before that is empty.
 */
int dmb_fuse_mount(int *ret_device, int *ret_root, int *ret_step);
/* Answers until the file is gone: 0 or -errno. Nothing else in the process waits for it. */
int dmb_fuse_serve(int device, const struct dmb_fuse_slab *slabs, size_t count, int writable);

/* System calls that Python has no names for. */

/*
 * The O_DIRECT alignments statx(2) tells of a file; 0 and 0 where it tells none, and -EOPNOTSUPP
 * where it tells that the file does not support O_DIRECT, though it may be opened with it.
 */
int dmb_statx_dio(int fd, uint32_t *memory_align, uint32_t *offset_align);
/* statfs(2)'s f_type, or -errno. */
int64_t dmb_statfs_type(int fd);
/* How many pages of a range are in the page cache: cachestat(2), Linux 6.5. */
int dmb_cachestat(int fd, uint64_t offset, uint64_t size, uint64_t *ret);
/* mincore(2): for each page of a mapping, whether it is in the page cache (bit 0). */
int dmb_resident(uint64_t address, uint64_t size, uint8_t *ret);
/* tee(2) without a wait: bytes of one pipe duplicated in another; their number, or -errno. */
int dmb_tee(int from, int to, uint64_t size);
/* fallocate(2), which unlike posix_fallocate(3) never writes zeros itself. */
int dmb_fallocate(int fd, uint64_t offset, uint64_t size, int keep_size);
/* fallocate(2) with FALLOC_FL_PUNCH_HOLE: a memory file's first bytes, which are zeros then. */
int dmb_punch(int fd, uint64_t size);
/* madvise(MADV_POPULATE_WRITE), Linux 5.14: page tables filled at once. */
int dmb_populate(uint64_t address, uint64_t size);
/*
 * madvise(MADV_COLLAPSE), Linux 6.1: a mapping of shared memory in transparent huge pages, filled
 * with zeros where there were none. Its end, and after -errno more of it, stays in ordinary pages.
 * -EINVAL where it does not begin at a multiple of a huge page.
 */
int dmb_collapse(uint64_t address, uint64_t size);
/* mbind(2) with MPOL_BIND to one node. */
int dmb_bind_node(uint64_t address, uint64_t size, unsigned node);
/* mmap(2) with MAP_SHARED | MAP_FIXED: a file's bytes from 0 on, in the place of a mapping of ours.
 */
int dmb_map_over(uint64_t address, uint64_t size, int fd, int writable);
/*
 * A fanotify group for dmb_fanotify_mark, or -errno: one that root has on any kernel, and others on
 * Linux 6.8 and newer.
 */
int dmb_fanotify_group(void);
/*
 * Marks a descriptor's inode, which the mark does not hold (FAN_MARK_EVICTABLE, Linux 5.19): it is
 * in the group's fdinfo for as long as the inode is there. No event ever comes of it: one that
 * nobody reads would hold the inode. Only for an inode without links, such as a memfd's: the mark
 * of a dma-buf whose last reference goes while fdinfo is read has the kernel wait for itself.
 */
int dmb_fanotify_mark(int group, int fd);
/* seccomp-free test of what io_uring_setup(2) answers: 0 or -errno. */
int dmb_uring_probe(void);

#endif
