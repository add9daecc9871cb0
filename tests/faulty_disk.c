/* Preloaded into a daemon: makes reads of files named *.faulty.safetensors fail or hang where $FAULTY_DISK says. That
 * file holds "error OFFSET" or "stall OFFSET"; a stalled read goes on when it says something else. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is_faulty(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, path, sizeof path - 1);
  path[size < 0 ? 0 : size] = '\0';
  return strstr(path, ".faulty.safetensors") != NULL;
}

/* 'e', 's', or 0 where nothing is wrong with these bytes. */
static char fault_in(off_t offset, size_t size_bytes) {
  const char* control = getenv("FAULTY_DISK");
  FILE* file = control == NULL ? NULL : fopen(control, "re");
  char word[16] = "";
  long long at = -1;
  if (file != NULL) {
    if (fscanf(file, "%15s %lld", word, &at) != 2) at = -1;
    fclose(file);
  }
  return at >= offset && at < offset + (off_t)size_bytes ? word[0] : '\0';
}

ssize_t pread64(int fd, void* target, size_t size_bytes, off64_t offset) {
  static ssize_t (*real)(int, void*, size_t, off64_t);
  if (real == NULL) *(void**)&real = dlsym(RTLD_NEXT, "pread64");
  if (is_faulty(fd)) {
    char fault = fault_in(offset, size_bytes);
    for (; fault == 's'; fault = fault_in(offset, size_bytes)) usleep(10000);
    if (fault == 'e') {
      errno = EIO;
      return -1;
    }
  }
  return real(fd, target, size_bytes, offset);
}

ssize_t pread(int fd, void* target, size_t size_bytes, off_t offset) { return pread64(fd, target, size_bytes, offset); }
