/* Makes one system call fail: the n-th of its kind on a file below a folder.
 *
 * Loaded into a Python process with LD_PRELOAD. `faults_arm` says which call fails with which
 * error; all kinds are counted from then on, so that a run without an error tells how many calls
 * there are. Calls by a descriptor are told by /proc.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, MKDIR, RENAME, UNLINK, RMDIR, FSYNC, WRITE, READ, FLOCK, CHMOD, STAT, LIST, KINDS };
static const char *NAMES[KINDS] = {"open", "mkdir", "rename", "unlink", "rmdir", "fsync", "write",
                                   "read", "flock", "chmod", "stat", "list"};

static char folder[4096];
static int wanted = -1, number = 0, failure = 0;
static int counts[KINDS];

void faults_arm(const char *kind, int which, int error, const char *below) {
    wanted = -1;
    for (int k = 0; k < KINDS; k++) {
        counts[k] = 0;
        if (!strcmp(NAMES[k], kind)) wanted = k;
    }
    number = which;
    failure = error;
    snprintf(folder, sizeof folder, "%s", below);
}

int faults_count(const char *kind) {
    for (int k = 0; k < KINDS; k++)
        if (!strcmp(NAMES[k], kind)) return counts[k];
    return -1;
}

static int fails(int kind, const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
    int now = __atomic_add_fetch(&counts[kind], 1, __ATOMIC_SEQ_CST);
    if (kind != wanted || now != number) return 0;
    errno = failure;
    return 1;
}

static ssize_t raw_readlink(const char *path, char *buffer, size_t size) {
    static ssize_t (*real)(const char *, char *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "readlink");
    return real(path, buffer, size);
}

static int fails_fd(int kind, int fd) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = raw_readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(kind, path);
}

#define REAL(type, name, ...)                            \
    static type (*real)(__VA_ARGS__);                    \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPENING(name)                                    \
    int name(const char *path, int flags, ...) {         \
        va_list rest;                                    \
        va_start(rest, flags);                           \
        int mode = va_arg(rest, int);                    \
        va_end(rest);                                    \
        REAL(int, name, const char *, int, ...);         \
        return fails(OPEN, path) ? -1 : real(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                 \
    int name(int at, const char *path, int flags, ...) { \
        va_list rest;                                    \
        va_start(rest, flags);                           \
        int mode = va_arg(rest, int);                    \
        va_end(rest);                                    \
        REAL(int, name, int, const char *, int, ...);    \
        return fails(OPEN, path) ? -1 : real(at, path, flags, mode); \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    return fails(MKDIR, path) ? -1 : real(path, mode);
}
int mkdirat(int at, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    return fails(MKDIR, path) ? -1 : real(at, path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return fails(RENAME, from) ? -1 : real(from, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    return fails(RENAME, from) ? -1 : real(a, from, b, to, flags);
}
int unlink(const char *path) {
    REAL(int, unlink, const char *);
    return fails(UNLINK, path) ? -1 : real(path);
}
int unlinkat(int at, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    int kind = flags & AT_REMOVEDIR ? RMDIR : UNLINK;
    return (at == AT_FDCWD ? fails(kind, path) : fails_fd(kind, at)) ? -1 : real(at, path, flags);
}
int rmdir(const char *path) {
    REAL(int, rmdir, const char *);
    return fails(RMDIR, path) ? -1 : real(path);
}
int fsync(int fd) {
    REAL(int, fsync, int);
    return fails_fd(FSYNC, fd) ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(int, fdatasync, int);
    return fails_fd(FSYNC, fd) ? -1 : real(fd);
}
ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    return fails_fd(WRITE, fd) ? -1 : real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    return fails_fd(WRITE, fd) ? -1 : real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    return fails_fd(WRITE, fd) ? -1 : real(fd, data, size, at);
}
ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, read, int, void *, size_t);
    return fails_fd(READ, fd) ? -1 : real(fd, data, size);
}
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(ssize_t, preadv, int, const struct iovec *, int, off_t);
    return fails_fd(READ, fd) ? -1 : real(fd, parts, count, at);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t at) {
    REAL(ssize_t, preadv64, int, const struct iovec *, int, off64_t);
    return fails_fd(READ, fd) ? -1 : real(fd, parts, count, at);
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    REAL(ssize_t, preadv64v2, int, const struct iovec *, int, off64_t, int);
    return fails_fd(READ, fd) ? -1 : real(fd, parts, count, at, flags);
}
int flock(int fd, int operation) {
    REAL(int, flock, int, int);
    return fails_fd(FLOCK, fd) ? -1 : real(fd, operation);
}
int chmod(const char *path, mode_t mode) {
    REAL(int, chmod, const char *, mode_t);
    return fails(CHMOD, path) ? -1 : real(path, mode);
}
int fchmodat(int at, const char *path, mode_t mode, int flags) {
    REAL(int, fchmodat, int, const char *, mode_t, int);
    return fails(CHMOD, path) ? -1 : real(at, path, mode, flags);
}
#define STATTING(name, type)                             \
    int name(const char *path, type *found) {            \
        REAL(int, name, const char *, type *);           \
        return fails(STAT, path) ? -1 : real(path, found); \
    }
STATTING(stat, struct stat)
STATTING(lstat, struct stat)
STATTING(stat64, struct stat64)
STATTING(lstat64, struct stat64)
#define STATTING_FD(name, type)                          \
    int name(int fd, type *found) {                      \
        REAL(int, name, int, type *);                    \
        return fails_fd(STAT, fd) ? -1 : real(fd, found); \
    }
STATTING_FD(fstat, struct stat)
STATTING_FD(fstat64, struct stat64)
DIR *opendir(const char *path) {
    REAL(DIR *, opendir, const char *);
    return fails(LIST, path) ? NULL : real(path);
}
DIR *fdopendir(int fd) {
    REAL(DIR *, fdopendir, int);
    return fails_fd(LIST, fd) ? NULL : real(fd);
}
