/* SPDX-License-Identifier: MIT */
/*
 * A FUSE file system without a mount point: the mount is made by fsopen(2) and fsmount(2), Linux
 * 5.2, and never attached. Its root is a regular file (rootmode), so there is nothing but that.
 *
 * Mounting FUSE is allowed to whoever is CAP_SYS_ADMIN in a user namespace, so to whoever may make
 * one. There the kernel lets only processes of the same user use the file: others are EOVERFLOW.
 * The administrator's may be used by all who are handed it, and opened again as its mode says.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

static int write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), rc = 0;

	if (fd < 0)
		return -errno;
	if (write(fd, text, strlen(text)) < 0)
		rc = -errno;
	close(fd);
	return rc;
}

/*
 * A user namespace in which this user is 0, and a mount namespace of that. (0 is whose the root of
 * a FUSE is until it was asked, and the file of nobody in the namespace cannot be opened for
 * writing.)
 */
static int enter_namespaces(void)
{
	const unsigned uid = geteuid(), gid = getegid();
	char text[64];
	int rc;

	if (unshare(CLONE_NEWUSER | CLONE_NEWNS))
		return -errno;
	rc = write_text("/proc/self/setgroups", "deny");
	if (rc)
		return rc;
	snprintf(text, sizeof(text), "0 %u 1", uid);
	rc = write_text("/proc/self/uid_map", text);
	if (rc)
		return rc;
	snprintf(text, sizeof(text), "0 %u 1", gid);
	return write_text("/proc/self/gid_map", text);
}

static int set(int fs, const char *key, const char *format, unsigned value)
{
	char text[16];

	snprintf(text, sizeof(text), format, value);
	return syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, key, text, 0) ? -errno : 0;
}

static int set_flag(int fs, const char *key)
{
	return syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, key, NULL, 0) ? -errno : 0;
}

static int configure(int fs, int device, int everyone)
{
	int rc = set(fs, "fd", "%u", device);

	rc = rc ? rc : set(fs, "rootmode", "%o", S_IFREG | 0600);
	rc = rc ? rc : set(fs, "user_id", "%u", geteuid());
	rc = rc ? rc : set(fs, "group_id", "%u", getegid());
	rc = rc ? rc : set(fs, "source", "dmabuf", 0);
	rc = rc ? rc : set(fs, "subtype", "dmabuf", 0);
	rc = rc ? rc : set_flag(fs, "default_permissions");
	rc = rc || !everyone ? rc : set_flag(fs, "allow_other");
	if (!rc && syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
		rc = -errno;
	return rc;
}

int dmb_fuse_mount(int *ret_device, int *ret_root, int *ret_step)
{
	int fs = syscall(SYS_fsopen, "fuse", FSOPEN_CLOEXEC), everyone = 1, device, root, rc;

	*ret_step = DMB_FUSE_MOUNT;
	if (fs < 0 && errno == EPERM) {
		*ret_step = DMB_FUSE_NAMESPACES;
		rc = enter_namespaces();
		if (rc)
			return rc;
		everyone = 0;
		*ret_step = DMB_FUSE_MOUNT;
		fs = syscall(SYS_fsopen, "fuse", FSOPEN_CLOEXEC);
	}
	if (fs < 0)
		return -errno;
	device = open("/dev/fuse", O_RDWR | O_CLOEXEC); /* by the namespace that mounts it */
	if (device < 0) {
		rc = -errno;
		*ret_step = DMB_FUSE_DEVICE;
		close(fs);
		return rc;
	}
	rc = configure(fs, device, everyone);
	root = rc ? -1 : syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
	if (root < 0) {
		rc = rc ? rc : -errno;
		close(device);
		close(fs);
		return rc;
	}
	close(fs);
	*ret_device = device;
	*ret_root = root;
	return 0;
}
