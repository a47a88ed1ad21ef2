/* SPDX-License-Identifier: MIT */
/*
 * The simulator's command line: run episodes on two processors, count what is violated, and shrink
 * the first failure.
 *
 *	simulate [--seconds N] [--episodes N] [--seed N] [--workers N] [--failures N] [--shrink N]
 *		[--seeds FILE] [--corpus FOLDER]
 *
 * An episode's seed is the first seed plus its number. A run ends after so many failures (20), and
 * tries so many smaller ones than the first (4000). --seeds runs the seeds of a file only, --corpus
 * the choices in the files of a folder, which libFuzzer found (../fuzz.c).
 */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "episode.h"
#include "virtual.h"

enum {
	WORKERS = 16,
	REPLAY = 64,	 /* every so many episodes run twice */
	PATIENCE_S = 30, /* for an episode that goes on for ever */
	BROKEN = 3,	 /* the exit status after a violated promise */
	MOST = 1 << 20,	 /* choices of an episode */
};

int __real_clock_gettime(clockid_t clock, struct timespec *ret);
void *__real_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);

/* What a worker, which may die, has done. */
struct progress {
	uint64_t seed, episodes, transfers;
	const char *format; /* of the message, the same in every process */
	size_t count;
	uint32_t choices[MOST];
};

static struct progress *mine;

static struct options {
	uint64_t seconds, episodes, seed, workers, failures, attempts;
	const char *seeds, *corpus;
} options = {.episodes = UINT64_MAX, .workers = 2, .failures = 20, .attempts = 4000};

static double seconds(void)
{
	struct timespec time;

	__real_clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void record(const char *format)
{
	const uint32_t *choices = choices_made(&mine->count);

	mine->format = format;
	memcpy(mine->choices, choices, mine->count * sizeof(*choices));
	_exit(BROKEN);
}

static void run_seed(uint64_t seed, bool twice)
{
	uint64_t hash;

	mine->seed = seed;
	alarm(PATIENCE_S);
	choices_from_seed(seed);
	hash = episode();
	mine->episodes++;
	mine->transfers = transfers_done();
	if (!twice)
		return;
	choices_from_seed(seed);
	if (episode() != hash)
		broken("the same seed, and another history");
}

/* -- workers */

static _Noreturn void work(struct progress *progress, uint64_t first, double until)
{
	uint64_t step = options.workers, number = progress->episodes;

	mine = progress;
	on_broken = record;
	for (; number < options.episodes && (!options.seconds || seconds() < until); number++)
		run_seed(first + number * step, number % REPLAY == 0);
	exit(0);
}

static struct totals {
	uint64_t episodes, transfers, undetected, in_flight, leaked, others;
	double seconds;
	uint64_t first; /* the seed of the first failure */
	bool failed;
} totals;

static void count_failure(const struct progress *progress, int status)
{
	const char *format = progress->format;
	static char kinds[4][12] = {"undetected", "in flight", "leaked"};
	uint64_t *counts[] = {&totals.undetected, &totals.in_flight, &totals.leaked};
	bool counted = false;

	if (!totals.failed)
		totals.first = progress->seed;
	totals.failed = true;
	for (int i = 0; format && WIFEXITED(status) && i < 3; i++)
		if (!strncmp(format, kinds[i], strlen(kinds[i])))
			counted = ++*counts[i];
	totals.others += !counted;
	if (WIFSIGNALED(status))
		printf("seed %llu: signal %d%s\n", (unsigned long long)progress->seed,
		       WTERMSIG(status),
		       WTERMSIG(status) == SIGALRM ? ", it goes on for ever" : "");
	else
		printf("... seed %llu\n", (unsigned long long)progress->seed);
	fflush(stdout);
}

static void run_workers(void)
{
	const size_t size = sizeof(struct progress) * options.workers;
	struct progress *progress =
		__real_mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	double begun = seconds(), until = begun + (double)options.seconds;
	uint64_t before[WORKERS] = {0}, failures = 0, running = options.workers;
	pid_t pids[WORKERS];

	if (progress == MAP_FAILED)
		exit(2);
	fflush(stdout);
	for (uint64_t i = 0; i < options.workers; i++)
		if (!(pids[i] = fork()))
			work(&progress[i], options.seed + i, until);
	while (running) {
		int status;
		pid_t pid = wait(&status);
		uint64_t i = 0;

		while (i < options.workers && pids[i] != pid)
			i++;
		before[i] += progress[i].transfers;
		progress[i].transfers = 0;
		if (!WIFEXITED(status) || WEXITSTATUS(status)) {
			count_failure(&progress[i], status);
			progress[i].episodes++; /* the next one */
			progress[i].format = NULL;
			if (++failures < options.failures) {
				if (!(pids[i] = fork()))
					work(&progress[i], options.seed + i, until);
				continue;
			}
			for (i = 0; i < options.workers; i++)
				if (pids[i] != pid)
					kill(pids[i], SIGKILL);
			break;
		}
		running--;
	}
	for (uint64_t i = 0; i < options.workers; i++) {
		totals.episodes += progress[i].episodes;
		totals.transfers += before[i];
	}
	munmap(progress, size);
	totals.seconds += seconds() - begun;
}

static void summary(void)
{
	printf("%llu transfers in %llu episodes from seed %llu, %.2g transfers an hour on %llu "
	       "processors, %llu undetected, %llu in flight at return, %llu leaked, %llu other "
	       "failures\n",
	       (unsigned long long)totals.transfers, (unsigned long long)totals.episodes,
	       (unsigned long long)options.seed, (double)totals.transfers / totals.seconds * 3600,
	       (unsigned long long)options.workers, (unsigned long long)totals.undetected,
	       (unsigned long long)totals.in_flight, (unsigned long long)totals.leaked,
	       (unsigned long long)totals.others);
}

/* -- a smaller failure */

struct failure {
	int status;
	const char *format;
	size_t count;
};

/* Run choices in another process; NULL: those of the seed. */
static struct failure attempt(struct progress *shared, const uint32_t *choices, size_t count,
			      uint64_t seed, bool loud)
{
	struct failure failure = {0};
	pid_t pid;

	fflush(stdout);
	shared->format = NULL;
	shared->count = 0;
	pid = fork();
	if (!pid) {
		mine = shared;
		on_broken = record;
		world.loud = loud;
		if (!loud && !freopen("/dev/null", "w", stdout))
			_exit(2);
		alarm(PATIENCE_S / 3);
		if (choices)
			choices_replay(choices, count);
		else
			choices_from_seed(seed);
		episode();
		_exit(0);
	}
	waitpid(pid, &failure.status, 0);
	failure.format = shared->format;
	failure.count = shared->count;
	return failure;
}

static bool same(const struct failure *one, const struct failure *other)
{
	return one->status == other->status && one->format == other->format;
}

/* Replace choices by 0, by large pieces first, as long as the failure is the same. */
static size_t zero(struct progress *shared, uint32_t *choices, size_t count,
		   const struct failure *wanted, unsigned *attempts)
{
	static uint32_t saved[MOST];
	size_t zeros = 0;

	for (size_t piece = count; piece; piece /= 2) {
		for (size_t at = 0; at < count && *attempts < options.attempts; at += piece) {
			size_t size = count - at < piece ? count - at : piece;
			bool any = false;
			struct failure failure;

			for (size_t i = at; i < at + size; i++)
				any = any || choices[i];
			if (!any)
				continue;
			memcpy(saved, choices + at, size * sizeof(*choices));
			memset(choices + at, 0, size * sizeof(*choices));
			++*attempts;
			failure = attempt(shared, choices, count, 0, false);
			if (same(&failure, wanted))
				count = failure.count && failure.count < count ? failure.count
									       : count;
			else
				memcpy(choices + at, saved, size * sizeof(*choices));
		}
	}
	for (size_t i = 0; i < count; i++)
		zeros += !choices[i];
	return count - zeros;
}

static void shrink(uint64_t seed)
{
	static uint32_t choices[MOST];
	struct progress *shared = __real_mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
					      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct failure wanted;
	unsigned attempts = 0;
	size_t left;

	if (shared == MAP_FAILED)
		exit(2);
	wanted = attempt(shared, NULL, 0, seed, false);
	if (!wanted.count) { /* it died without a word, or did not fail alone */
		printf("seed %llu: status %#x, not shrunk\n", (unsigned long long)seed,
		       (unsigned)wanted.status);
		return;
	}
	memcpy(choices, shared->choices, wanted.count * sizeof(*choices));
	left = zero(shared, choices, wanted.count, &wanted, &attempts);
	printf("\nseed %llu, %zu choices, of which %zu matter:\n", (unsigned long long)seed,
	       wanted.count, left);
	attempt(shared, choices, wanted.count, 0, true);
	printf("replay: simulate --episodes 1 --seed %llu\n\n", (unsigned long long)seed);
}

/* -- the seeds that failed before */

static void run_file(const char *path)
{
	FILE *file = fopen(path, "r");
	unsigned long long seed;
	char line[200];

	if (!file) {
		perror(path);
		exit(2);
	}
	options.workers = 1;
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%llu", &seed) != 1)
			continue;
		options.seed = seed;
		options.episodes = 1;
		run_workers();
	}
	fclose(file);
}

/* -- the choices that libFuzzer found */

static const char *input;

static void run_input(const char *path)
{
	static uint8_t data[2 * MOST];
	FILE *file = fopen(path, "rb");
	size_t size = file ? fread(data, 1, sizeof(data), file) : 0;

	if (!file) {
		perror(path);
		exit(2);
	}
	fclose(file);
	input = path;
	alarm(PATIENCE_S);
	choices_from_bytes(data, size);
	episode();
	alarm(0);
	totals.episodes++;
}

static void input_broken(const char *format)
{
	(void)format;
	printf("... %s\n", input);
	exit(BROKEN);
}

static void run_corpus(const char *folder)
{
	DIR *opened = opendir(folder);
	double begun = seconds();
	struct dirent *entry;
	char path[4096];

	if (!opened) {
		perror(folder);
		exit(2);
	}
	on_broken = input_broken;
	while ((entry = readdir(opened)))
		if (entry->d_name[0] != '.') {
			snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
			run_input(path);
		}
	closedir(opened);
	totals.transfers = transfers_done();
	totals.seconds = seconds() - begun;
}

static void parse(int argc, char **argv)
{
	static const struct {
		const char *name;
		uint64_t *value;
	} numbers[] = {
		{"--seconds", &options.seconds},   {"--episodes", &options.episodes},
		{"--seed", &options.seed},	   {"--workers", &options.workers},
		{"--failures", &options.failures}, {"--shrink", &options.attempts},
	};

	for (int i = 1; i < argc; i += 2) {
		bool known = false;

		if (i + 1 < argc && !strcmp(argv[i], "--seeds")) {
			options.seeds = argv[i + 1];
			continue;
		}
		if (i + 1 < argc && !strcmp(argv[i], "--corpus")) {
			options.corpus = argv[i + 1];
			continue;
		}
		for (int k = 0; i + 1 < argc && k < 6; k++) {
			char *rest;

			if (strcmp(argv[i], numbers[k].name))
				continue;
			*numbers[k].value = strtoull(argv[i + 1], &rest, 0);
			known = !*rest && *argv[i + 1];
		}
		if (!known) {
			printf("usage: simulate [--seconds N] [--episodes N] [--seed N] "
			       "[--workers N] [--failures N] [--shrink N] [--seeds FILE] "
			       "[--corpus FOLDER]\n");
			exit(2);
		}
	}
	if (!options.workers || options.workers > WORKERS)
		options.workers = 2;
	if (!options.seconds && options.episodes == UINT64_MAX)
		options.episodes = 10000;
}

int main(int argc, char **argv)
{
	parse(argc, argv);
	if (options.seeds)
		run_file(options.seeds);
	else if (options.corpus)
		run_corpus(options.corpus);
	else
		run_workers();
	if (totals.failed && options.attempts)
		shrink(totals.first);
	summary();
	return totals.failed;
}
