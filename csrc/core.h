/* SPDX-License-Identifier: MIT */
/*
 * The API of the C core. cffi parses the same declarations (csrc/build_ffi.py strips the
 * preprocessor lines), so this file uses only what cffi can parse.
 *
 * A function that can fail returns 0 or a count, or -errno; an out-parameter comes last and is
 * called ret. There are no globals and no locks: the caller makes sure that one thread at a time
 * uses a ring and its batches. Only dmb_ring_register_buffer and dmb_ring_register_file may be
 * called while a batch runs, from any thread, on a ring made without DMB_RING_SINGLE_ISSUER.
 */
#ifndef DMABUF_CORE_H
#define DMABUF_CORE_H

#include <stddef.h>
#include <stdint.h>

struct dmb_ring;  /* an io_uring ring, or a thread backend that takes the same requests */
struct dmb_batch; /* a transfer of an array of segments on a ring */

enum dmb_backend {
	DMB_BACKEND_URING = 0,
	DMB_BACKEND_THREADS =
		1, /* `depth` worker threads; with 0 the calling thread runs the requests */
};

enum dmb_ring_flags {
	DMB_RING_SINGLE_ISSUER = 1, /* with DEFER_TASKRUN: one thread owns the ring */
	DMB_RING_PASSTHROUGH = 2,   /* SQE128 and CQE32, for jobs with a nsid */
};

/* The sizes of a ring's tables of registered buffers and files. */
#define DMB_BUFFER_SLOTS 4096
#define DMB_FILE_SLOTS 512

/* What a ring supports. */
struct dmb_ring_info {
	int32_t backend;
	uint32_t depth;
	uint32_t setup_flags; /* IORING_SETUP_* that the kernel accepted */
	int32_t buffer_table; /* 0, or the -errno of creating the table of buffers */
	int32_t file_table;   /* 0, or the -errno of creating the table of files */
};

int dmb_ring_create(int backend, unsigned depth, unsigned flags, struct dmb_ring **ret);
void dmb_ring_destroy(struct dmb_ring *ring);
void dmb_ring_get_info(const struct dmb_ring *ring, struct dmb_ring_info *ret);
/* Pin [address, address + size) into a slot; size 0 clears the slot. */
int dmb_ring_register_buffer(struct dmb_ring *ring, unsigned slot, uint64_t address, uint64_t size);
/*
 * Probe for dma-buf registered buffers with an update that changes nothing. Returns 0 or -errno:
 * -EINVAL if the kernel does not support them.
 */
int dmb_ring_probe_native(struct dmb_ring *ring);
/*
 * Register a dma-buf for I/O with the open file target_fd; dmabuf_fd -1 clears the slot. A request
 * with the slot must use that open file, and its address is an offset into the dma-buf.
 */
int dmb_ring_register_dmabuf(struct dmb_ring *ring, unsigned slot, int dmabuf_fd, int target_fd);
/* Register a file in a slot; fd -1 clears the slot. */
int dmb_ring_register_file(struct dmb_ring *ring, unsigned slot, int fd);
/*
 * Run the work that the kernel defers to the ring's owner (DEFER_TASKRUN). It may drop the last
 * reference to a request's file, whose device stays busy until then.
 */
void dmb_ring_run_deferred(struct dmb_ring *ring);

enum dmb_direction {
	DMB_READ = 0,  /* file to buffer */
	DMB_WRITE = 1, /* buffer to file */
};

enum dmb_route {
	DMB_DIRECT = 1,	  /* O_DIRECT to or from the buffer's pages */
	DMB_STAGED = 2,	  /* O_DIRECT to or from staging blocks, which the CPU copies */
	DMB_BUFFERED = 3, /* through the page cache */
	DMB_NATIVE = 4,	  /* O_DIRECT with dma-bufs registered with the ring, one a slot */
};

/* A part of a file, and its place on the block device that holds the file. */
struct dmb_extent {
	uint64_t offset; /* in the file */
	uint64_t place;	 /* on the device */
	uint64_t size;
};

/*
 * One open file and one buffer in one direction. The caller fills it in once and copies it for
 * each transfer, setting the fields below "of one transfer".
 */
struct dmb_job {
	/* the file */
	int32_t fd;	       /* with O_DIRECT, or -1; without it for DMB_BUFFERED */
	int32_t plain_fd;      /* without O_DIRECT: the edges of a write, and the file's size */
	uint32_t offset_align; /* of file offsets and lengths, a power of two */
	uint32_t memory_align; /* of memory addresses, a power of two */
	uint32_t page;	       /* the page size, at whose multiples the edges of a write end */
	/* 1 if the kernel may not invalidate the page cache after an asynchronous O_DIRECT write
	   to fd (block devices, FUSE): the batch then drops the written range from it */
	uint32_t stale_cache;
	/* the namespace of an NVMe character device; 0 for other files. io_uring needs a ring made
	   with DMB_RING_PASSTHROUGH. The block is offset_align; file_size, `page` and a write's
	   segments are multiples of it */
	uint32_t nsid;
	uint32_t lba_shift; /* the namespace's block is 1 << lba_shift bytes */
	/* the buffer */
	uint64_t base;	      /* address of its first byte, or 0 */
	uint64_t size;	      /* in bytes */
	const int32_t *slabs; /* its dma-bufs, or NULL */
	uint64_t slab_size;   /* bytes of each dma-buf except the last */
	int32_t direction;
	/* of one transfer */
	int32_t route;
	uint64_t file_size;   /* in bytes; the last partial block is read through staging */
	int32_t file_slot;    /* the registered slot of fd, or -1 */
	uint32_t depth;	      /* maximum requests in flight */
	uint32_t block;	      /* maximum bytes of a request, a multiple of both alignments */
	const int32_t *slots; /* registered slot, or -1, of each slot_size bytes; NULL for none */
	uint64_t slot_size;   /* on DMB_NATIVE, slab_size */
	/* of a read of a file from its block device, to which fd then refers: the written parts of
	   the file in ascending order, in multiples of offset_align; NULL for other jobs. The CPU
	   fills the buffer with zeros for the rest of the file */
	const struct dmb_extent *extents;
	size_t extent_count;
};

struct dmb_result {
	uint64_t nbytes;   /* bytes moved without a gap, from the first segment's start */
	uint64_t copied;   /* bytes that the CPU copied */
	uint64_t straight; /* bytes moved by the device between file and buffer */
	uint64_t requests; /* completed requests */
	uint64_t reissues; /* requests issued again after EAGAIN or EINTR, see pacing.c */
	int32_t error;	   /* 0, or the errno of the first request that failed; EBUSY if the page
			      cache still holds old bytes of a range that was written */
	int32_t failed_straight; /* 1 if that request was not staged */
	uint64_t error_offset;	 /* file offset of the first byte that could not be moved */
	int64_t short_segment; /* index of the first segment that met the end of the file, or -1 */
	uint32_t nvme_status;  /* the NVMe status that caused `error`, or 0 */
};

/* How well a route fits an array of segments. */
struct dmb_fit {
	uint64_t without_straight; /* segments with no byte that the route can move */
	uint64_t with_edges;	   /* segments with bytes that the CPU must copy */
};

/*
 * How a write treats pages of the file that it covers only in part. A write of the first kind loses
 * its bytes of such a page where one of the second kind writes other bytes of it at the same time.
 */
enum dmb_shared {
	DMB_SHARED_DIRECT = 1, /* it writes whole blocks of the page, past the page cache */
	DMB_SHARED_CACHED = 2, /* it writes edges through the page cache */
};

/* Sums and bounds of an array of segments between one file and one buffer. */
struct dmb_measure {
	uint64_t file_size; /* the file's present size */
	uint64_t count;	    /* segments that are not empty */
	uint64_t joined;    /* segments after dmb_segments_join */
	uint64_t nbytes;
	uint64_t file_start, file_end; /* all 0 if every segment is empty */
	uint64_t buffer_start, buffer_end;
	struct dmb_fit native, direct, staged;
	uint64_t off_block;    /* segments whose memory is less aligned than the file's blocks */
	uint32_t in_use;       /* 1 if a device still uses a dma-buf that the segments touch */
	uint32_t shared_pages; /* DMB_SHARED_...: the pages that a write covers only in part */
	uint64_t bad;	       /* index of the segment that caused an error */
};

/*
 * Measure segments: triples of file offset, buffer offset and size, in bytes. Returns 0; -ERANGE
 * if one leaves the file range 0..2^63-1 or the buffer; -EEXIST if two of a write overlap in the
 * file; -EINVAL if a write to an NVMe character device is not whole blocks; or the -errno of
 * reading the file's size.
 */
int dmb_job_measure(const struct dmb_job *job, const uint64_t *segments, size_t count,
		    struct dmb_measure *ret);

/*
 * Join measured segments that are adjacent in the file and in the buffer, and drop empty ones, so
 * that each needs fewer requests. Writes the remaining segments to ret.
 */
void dmb_segments_join(const uint64_t *segments, size_t count, uint64_t *ret);

/*
 * Move `size` bytes between file offset `offset` and buffer offset `start` with one pread(2) or
 * pwrite(2): a ring makes a small aligned request no faster. Returns 1 if all bytes were moved; 0
 * if the caller must use dmb_job_run (edges, the end of the file, an unsignalled fence, an error,
 * a short count). Waits only for the device.
 */
int dmb_job_run_small(const struct dmb_job *job, uint64_t offset, uint64_t start, uint64_t size,
		      int fence);

/*
 * Open a regular file, read a range of it as dmb_job_run_small does, and close it: one of many
 * files for which a caller need not find out what it knows of job->fd. Returns 1 if all bytes were
 * moved; 0 if the caller must open the file itself, also where it lies on another mount than
 * job->fd, takes O_DIRECT with another alignment, or the kernel numbers no mounts (before 6.8).
 */
int dmb_job_read_file(const struct dmb_job *job, const char *path, uint64_t offset, uint64_t start,
		      uint64_t size, int fence);

/*
 * Run a job for at most timeout_ms. The first call creates *batch; the call that ends the job
 * destroys it. Returns 1: call again; 0: done, and *ret is filled in; or -errno, also done. Between
 * two calls dmb_batch_drain(*batch) ends the job early. Keep the slots and the segments valid until
 * the job has ended.
 */
int dmb_job_run(struct dmb_ring *ring, const struct dmb_job *job, const uint64_t *segments,
		size_t count, int timeout_ms, struct dmb_batch **batch, struct dmb_result *ret);

/*
 * Create a batch with copies of the job and of a single segment. Keep the slots, and an array of
 * two or more segments, valid until the batch is destroyed.
 */
int dmb_batch_create(struct dmb_ring *ring, const struct dmb_job *job, const uint64_t *segments,
		     size_t count, struct dmb_batch **ret);
/* Run a batch for at most timeout_ms. Returns 1: call again; 0: done; or -errno. */
int dmb_batch_run(struct dmb_batch *batch, int timeout_ms);
/* Submit nothing more, cancel requests, and return when none is in flight. */
void dmb_batch_drain(struct dmb_batch *batch);
void dmb_batch_get_result(const struct dmb_batch *batch, struct dmb_result *ret);
void dmb_batch_destroy(struct dmb_batch *batch); /* drains */

/*
 * Many batches on one ring, driven by an event loop. These functions do not wait for a device.
 *
 * dmb_ring_poll submits requests of the started batches in turn, at most the ring's depth at a
 * time, handles completions, and appends the batches that are done to done[*ret], incrementing *ret
 * up to `capacity`; if it reaches that, call it again. It never resets *ret, so a caller that is
 * interrupted loses no entry. The eventfd (-1 for none) is signalled when it should be called.
 */
struct dmb_done {
	uint64_t tag;
	uint64_t nbytes; /* bytes moved without a gap */
};
int dmb_ring_set_eventfd(struct dmb_ring *ring, int fd);
int dmb_ring_poll(struct dmb_ring *ring, struct dmb_done *done, uint32_t capacity, uint32_t *ret);
void dmb_batch_start(struct dmb_batch *batch, uint64_t tag);
/* Submit nothing more and cancel requests; dmb_ring_poll reports when the batch is done. */
void dmb_batch_stop(struct dmb_batch *batch);
/*
 * Create and start a batch of one request for a range that dmb_job_run_small could move. Returns 0,
 * -EOPNOTSUPP if the range needs dmb_batch_create, or -errno.
 */
int dmb_job_start_small(struct dmb_ring *ring, const struct dmb_job *job, uint64_t offset,
			uint64_t start, uint64_t size, int fence, uint64_t tag,
			struct dmb_batch **ret);

/* Return the -errno, or the name, of an NVMe status; the bits above its code are optional. */
int dmb_nvme_errno(uint32_t status, int direction);
const char *dmb_nvme_status_name(uint32_t status);

/*
 * A buffer as a block device, by the ublk driver: Linux 6.5, include/uapi/linux/ublk_cmd.h.
 *
 * dmb_ublk_control runs a command UBLK_U_CMD_... on /dev/ublk-control: `data` is its argument of
 * `size` bytes, `value` the number in the command itself. It waits as long as the command does.
 *
 * dmb_ublk_serve carries out the requests of a device without the driver's own copies
 * (UBLK_F_USER_COPY), in the calling thread, until the device is stopped (0) or fails (-errno).
 * `job` has base, size, slabs and slab_size, and in fd the character device, /dev/ublkcN. `depth`
 * is the device's queue depth. A request that has waited for fences of a dma-buf for fence_ms
 * fails. The eventfd `ready` is signalled when UBLK_U_CMD_START_DEV may follow. Its value is the
 * descriptor of the thread's ring, which keeps the device too: the child of a fork must close both.
 */
int dmb_ublk_control(int control, uint32_t op, uint32_t device, void *data, uint16_t size,
		     uint64_t value);
int dmb_ublk_serve(const struct dmb_job *job, unsigned depth, int fence_ms, int ready);

/* System calls that Python does not provide. */

/*
 * Get the O_DIRECT alignments that statx(2) reports for a file, of memory and of offsets: 0 and 0
 * if it reports none. Returns -EOPNOTSUPP if it reports that the file does not support O_DIRECT,
 * although open(2) accepts the flag.
 */
int dmb_statx_dio(int fd, uint32_t ret[2]);
/* What one statx(2) reports of an open file. */
struct dmb_stat {
	uint64_t
		mount; /* unique until the next boot (STATX_MNT_ID_UNIQUE, Linux 6.8); 0: unknown */
	uint32_t mode;
	uint32_t memory_align; /* of O_DIRECT; 0 where it is not supported, or not stated */
	uint32_t offset_align;
	int32_t allocated; /* it has bytes or blocks */
};
int dmb_stat(int fd, struct dmb_stat *ret);
/*
 * Return the st_mode of a file whose filesystem is on a block device, 0 of any other, or -errno. It
 * waits neither for a FUSE server nor for a network (AT_STATX_DONT_SYNC).
 */
int dmb_mode_on_disk(int fd);
/* Return the f_type of statfs(2), or -errno. */
int64_t dmb_statfs_type(int fd);
/*
 * Open a path that does not lead out of a folder, by ".." or a symbolic link either (-EXDEV):
 * openat2(2) with RESOLVE_BENEATH, Linux 5.6. `mode` is 0 without O_CREAT. Returns a descriptor.
 */
int dmb_open_beneath(int folder, const char *path, int flags, unsigned mode);
/* Count the pages of a range in the page cache: cachestat(2), Linux 6.5. */
int dmb_cachestat(int fd, uint64_t offset, uint64_t size, uint64_t *ret);
/* mincore(2): report for each page of a mapping whether it is in the page cache (bit 0). */
int dmb_resident(uint64_t address, uint64_t size, uint8_t *ret);
/* Duplicate bytes of one pipe in another: tee(2) without waiting. Returns a count or -errno. */
int dmb_tee(int from, int to, uint64_t size);
/* fallocate(2): unlike posix_fallocate(3), it does not fall back to writing zeros. */
int dmb_fallocate(int fd, uint64_t offset, uint64_t size, int keep_size);
/* Fault in a mapping for writing: madvise(MADV_POPULATE_WRITE), Linux 5.14. */
int dmb_populate(uint64_t address, uint64_t size);
/*
 * Back a mapping of shared memory with transparent huge pages, zero-filled where it had no pages:
 * madvise(MADV_COLLAPSE), Linux 6.1. A partial huge page at its end keeps ordinary pages, and so
 * may all of it after an error. Returns -EINVAL if it does not begin at a multiple of a huge page.
 */
int dmb_collapse(uint64_t address, uint64_t size);
/* Bind memory to one NUMA node: mbind(2) with MPOL_BIND. */
int dmb_bind_node(uint64_t address, uint64_t size, unsigned node);
/* Count the pages of a mapping that are not on a NUMA node, looking at one in each `step` bytes. */
int64_t dmb_count_elsewhere(uint64_t address, uint64_t size, uint64_t step, unsigned node);
struct dmb_policy {
	int mode; /* negative: nothing is saved */
	unsigned long nodes[16];
};
/* Bind what the kernel allocates for this thread to one NUMA node, and save the policy before. */
int dmb_policy_bind(unsigned node, struct dmb_policy *ret);
int dmb_policy_restore(const struct dmb_policy *policy);
/* Replace a mapping with a file's bytes from offset 0: mmap(2), MAP_SHARED | MAP_FIXED. */
int dmb_map_over(uint64_t address, uint64_t size, int fd, int writable);
/* Probe whether io_uring can be used: the 0 or -errno of io_uring_setup(2). */
int dmb_uring_probe(void);

#endif
