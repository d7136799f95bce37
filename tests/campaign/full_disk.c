// A disk that is full, for the campaign: preloaded into a process, it makes every call that needs space in one folder fail with
// ENOSPC from a given call on. Calls are counted in memory that forked processes share.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long fails_from = -1;  // number of the first call that fails; -1: none
static long *calls;

// Watch the files in a folder. Called in the process that runs the command.
void full_disk_arm(const char *path, long from) {
  if (!calls) calls = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  *calls = 0;
  fails_from = from;
  snprintf(folder, sizeof folder, "%s", path);
}

// Memory that a process and the one that forked from it share.
long *full_disk_counter(void) {
  if (!calls) calls = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return calls;
}

static int inside(const char *path) {
  char absolute[PATH_MAX];
  if (!folder[0] || !path) return 0;
  if (path[0] != '/') {
    if (!getcwd(absolute, sizeof absolute)) return 0;
    size_t n = strlen(absolute);
    snprintf(absolute + n, sizeof absolute - n, "/%s", path);
    path = absolute;
  }
  return strncmp(path, folder, strlen(folder)) == 0;
}

static int full(void) {
  long call = __atomic_fetch_add(calls, 1, __ATOMIC_SEQ_CST);
  if (fails_from < 0 || call < fails_from) return 0;
  errno = ENOSPC;
  return 1;
}

static int full_for_handle(int handle) {
  char link[64], path[PATH_MAX];
  if (!folder[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return 0;
  path[n] = 0;
  return inside(path) && full();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int handle, const void *data, size_t n) { return full_for_handle(handle) ? -1 : REAL(write)(handle, data, n); }

ssize_t writev(int handle, const struct iovec *parts, int n) {
  return full_for_handle(handle) ? -1 : REAL(writev)(handle, parts, n);
}

ssize_t pwrite64(int handle, const void *data, size_t n, off64_t at) {
  return full_for_handle(handle) ? -1 : REAL(pwrite64)(handle, data, n, at);
}

size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
  return full_for_handle(fileno(file)) ? 0 : REAL(fwrite)(data, size, n, file);
}

int fsync(int handle) { return full_for_handle(handle) ? -1 : REAL(fsync)(handle); }

int ftruncate64(int handle, off64_t n) { return full_for_handle(handle) ? -1 : REAL(ftruncate64)(handle, n); }

int posix_fallocate64(int handle, off64_t at, off64_t n) {
  return full_for_handle(handle) ? ENOSPC : REAL(posix_fallocate64)(handle, at, n);
}

int mkdir(const char *path, mode_t mode) { return inside(path) && full() ? -1 : REAL(mkdir)(path, mode); }

static int opened(const char *name, int at, const char *path, int flags, mode_t mode) {
  struct stat unused;
  if ((flags & O_CREAT) && inside(path) && stat(path, &unused) && full()) return -1;
  int (*real)(int, const char *, int, ...) = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, name);
  return real(at, path, flags, mode);
}

#define OPEN(name)                                                  \
  int name(const char *path, int flags, ...) {                      \
    va_list rest;                                                   \
    va_start(rest, flags);                                          \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                   \
    return opened("openat64", AT_FDCWD, path, flags, mode);         \
  }
OPEN(open)
OPEN(open64)
