// CHECK: for our own bugs only. Data from files, sockets and callers gets a Result instead.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace tensord::base {

// Prints the place and the broken promise to stderr and aborts. Never returns.
[[noreturn]] inline void check_failed(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: broken promise: %s\n", file, line, what);
  std::abort();
}

}  // namespace tensord::base

#define CHECK(condition) ((condition) ? void(0) : ::tensord::base::check_failed(__FILE__, __LINE__, #condition))
