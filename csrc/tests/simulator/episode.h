/* SPDX-License-Identifier: MIT */
#ifndef DMABUF_EPISODE_H
#define DMABUF_EPISODE_H

#include <stdint.h>

/* Run one episode of the choices to come; return the hash of its history. */
uint64_t episode(void);
/* Return the number of transfers of all episodes. */
uint64_t transfers_done(void);

#endif
