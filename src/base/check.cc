#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace tensord::base {

void check_failed(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: broken promise: %s\n", file, line, what);
  std::abort();
}

}  // namespace tensord::base
