/* SPDX-License-Identifier: MIT */
/* The thread backend: pread(2) and pwrite(2), if io_uring is refused or threads are faster. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

struct list {
	struct dmb_io *head;
	struct dmb_io **tail;
	unsigned count;
};

struct dmb_threads {
	pthread_mutex_t lock;
	pthread_cond_t work;
	pthread_cond_t done;
	struct list queued;
	struct list completed;
	bool stopping;
	unsigned count;
	pthread_t thread[];
};

static void list_init(struct list *list)
{
	list->head = NULL;
	list->tail = &list->head;
	list->count = 0;
}

static void list_push(struct list *list, struct dmb_io *io)
{
	io->next = NULL;
	*list->tail = io;
	list->tail = &io->next;
	list->count++;
}

static struct dmb_io *list_pop(struct list *list)
{
	struct dmb_io *io = list->head;

	if (io) {
		list->head = io->next;
		list->count--;
		if (!list->head)
			list->tail = &list->head;
	}
	return io;
}

static bool list_remove(struct list *list, struct dmb_io *io)
{
	for (struct dmb_io **link = &list->head; *link; link = &(*link)->next) {
		if (*link != io)
			continue;
		*link = io->next;
		list->count--;
		if (list->tail == &io->next)
			list->tail = link;
		return true;
	}
	return false;
}

int64_t dmb_read_write(int direction, int fd, uint64_t address, uint64_t size, uint64_t offset)
{
	void *memory = (void *)(uintptr_t)address;
	ssize_t rc = direction == DMB_READ ? pread(fd, memory, size, (off_t)offset)
					   : pwrite(fd, memory, size, (off_t)offset);

	return rc < 0 ? -errno : rc;
}

static int32_t move(struct dmb_io *io)
{
	if (!io->length)
		return 0; /* past the end, or a hole of the file */
	if (io->nsid)
		return dmb_nvme_execute(io);
	return (int32_t)dmb_read_write(io->direction, io->fd, (uint64_t)(uintptr_t)io->address,
				       io->length, io->offset);
}

/* The thread that moves a staging block also copies it, while its processor's cache holds it. */
static void execute(struct dmb_io *io)
{
	if (io->kind == DMB_FLUSH) {
		io->result = sync_file_range(io->fd, (off_t)io->offset, io->length, DMB_FLUSH_FLAGS)
				     ? -errno
				     : 0;
		return;
	}
	if (io->staged && io->direction == DMB_WRITE)
		dmb_fill_block(io);
	io->result = move(io);
	if (io->staged && io->direction == DMB_READ && io->result > 0)
		dmb_empty_block(io, (uint64_t)io->result);
}

/* Signal the eventfd once for all completed requests. The caller holds the lock if there are
   workers. */
static void complete(struct dmb_ring *ring, struct dmb_io *io)
{
	struct dmb_threads *threads = ring->threads;
	bool first = !threads->completed.head;

	list_push(&threads->completed, io);
	if (first && ring->eventfd >= 0)
		eventfd_write(ring->eventfd, 1);
}

/*
 * Whether to wake the submitter. It competes with the workers for a processor, so wake it only when
 * the workers are about to run dry, not for each completed request.
 */
static bool worth_waking(const struct dmb_threads *threads)
{
	return threads->completed.head &&
	       (!threads->count || threads->queued.count < threads->count);
}

static void *worker(void *arg)
{
	struct dmb_ring *ring = arg;
	struct dmb_threads *threads = ring->threads;

	pthread_mutex_lock(&threads->lock);
	while (!threads->stopping) {
		struct dmb_io *io = list_pop(&threads->queued);

		if (!io) {
			pthread_cond_wait(&threads->work, &threads->lock);
			continue;
		}
		pthread_mutex_unlock(&threads->lock);
		execute(io);
		pthread_mutex_lock(&threads->lock);
		complete(ring, io);
		if (worth_waking(threads))
			pthread_cond_signal(&threads->done);
	}
	pthread_mutex_unlock(&threads->lock);
	return NULL;
}

static void threads_destroy(struct dmb_ring *ring)
{
	struct dmb_threads *threads = ring->threads;

	pthread_mutex_lock(&threads->lock);
	threads->stopping = true;
	pthread_cond_broadcast(&threads->work);
	pthread_mutex_unlock(&threads->lock);
	for (unsigned i = 0; i < threads->count; i++)
		pthread_join(threads->thread[i], NULL);
	pthread_cond_destroy(&threads->work);
	pthread_cond_destroy(&threads->done);
	pthread_mutex_destroy(&threads->lock);
	free(threads);
}

static int threads_issue(struct dmb_ring *ring, struct dmb_io *io)
{
	struct dmb_threads *threads = ring->threads;

	pthread_mutex_lock(&threads->lock);
	list_push(&threads->queued, io);
	ring->issued = true;
	pthread_cond_signal(&threads->work);
	pthread_mutex_unlock(&threads->lock);
	return 0;
}

/* Without workers, the waiting thread runs the requests. */
static void execute_one(struct dmb_ring *ring)
{
	struct dmb_threads *threads = ring->threads;
	struct dmb_io *io = threads->completed.head ? NULL : list_pop(&threads->queued);

	if (!io)
		return;
	execute(io);
	complete(ring, io);
}

static int threads_wait(struct dmb_ring *ring, int timeout_ms)
{
	struct dmb_threads *threads = ring->threads;
	struct timespec until;

	if (!threads->count)
		execute_one(ring);
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&threads->lock);
	while (!worth_waking(threads))
		if (pthread_cond_timedwait(&threads->done, &threads->lock, &until))
			break;
	pthread_mutex_unlock(&threads->lock);
	return 0;
}

static int threads_poll(struct dmb_ring *ring)
{
	ring->issued = false;
	if (!ring->threads->count)
		execute_one(ring);
	return 0;
}

static struct dmb_io *threads_reap(struct dmb_ring *ring)
{
	struct dmb_threads *threads = ring->threads;
	struct dmb_io *io;

	pthread_mutex_lock(&threads->lock);
	io = list_pop(&threads->completed);
	pthread_mutex_unlock(&threads->lock);
	return io;
}

static void threads_cancel(struct dmb_ring *ring, struct dmb_io *io)
{
	struct dmb_threads *threads = ring->threads;

	pthread_mutex_lock(&threads->lock);
	if (list_remove(&threads->queued, io)) {
		io->result = -ECANCELED;
		complete(ring, io);
	}
	pthread_mutex_unlock(&threads->lock);
}

static int threads_register_dmabuf(struct dmb_ring *ring, unsigned slot, int dmabuf_fd,
				   int target_fd)
{
	(void)ring;
	(void)slot;
	(void)dmabuf_fd;
	(void)target_fd;
	return -EOPNOTSUPP;
}

static const struct dmb_backend_ops threads_ops = {
	.destroy = threads_destroy,
	.issue = threads_issue,
	.wait = threads_wait,
	.poll = threads_poll,
	.reap = threads_reap,
	.cancel = threads_cancel,
	.register_dmabuf = threads_register_dmabuf,
};

/* Block every signal in a worker, so that the program's own threads handle them. */
static int start_worker(struct dmb_ring *ring, unsigned index)
{
	sigset_t all, before;
	int rc;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	rc = pthread_create(&ring->threads->thread[index], NULL, worker, ring);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -rc;
}

int dmb_threads_init(struct dmb_ring *ring)
{
	unsigned count = ring->info.depth;
	struct dmb_threads *threads = calloc(1, sizeof(*threads) + count * sizeof(pthread_t));
	pthread_condattr_t attr;

	if (!threads)
		return -ENOMEM;
	list_init(&threads->queued);
	list_init(&threads->completed);
	pthread_mutex_init(&threads->lock, NULL);
	pthread_cond_init(&threads->work, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&threads->done, &attr);
	pthread_condattr_destroy(&attr);
	ring->threads = threads;
	ring->ops = &threads_ops;
	for (; threads->count < count; threads->count++) {
		int rc = start_worker(ring, threads->count);

		if (rc && !threads->count) {
			threads_destroy(ring);
			return rc;
		}
		if (rc)
			break; /* go on with fewer workers */
	}
	return 0;
}
