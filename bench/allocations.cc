#include "bench/allocations.h"

#include <atomic>
#include <cstddef>

namespace tensord::bench {

namespace {
std::atomic<uint64_t> all_count{0};
std::atomic<uint64_t> large_count{0};

AllocationCount so_far() { return {all_count, large_count}; }

[[maybe_unused]] void note(size_t size_bytes) {
  constexpr size_t kLarge = 1 << 20;
  all_count.fetch_add(1, std::memory_order_relaxed);
  if (size_bytes > kLarge) large_count.fetch_add(1, std::memory_order_relaxed);
}
}  // namespace

AllocationWatch::AllocationWatch() : before_(so_far()) {}

AllocationCount AllocationWatch::count() const {
  const AllocationCount now = so_far();
  return {now.all - before_.all, now.large - before_.large};
}

bool AllocationWatch::works() { return !TENSORD_SANITIZED; }

}  // namespace tensord::bench

#if !TENSORD_SANITIZED
// glibc's allocator under its second name: "Replacing malloc" in its manual allows a program to define these.
extern "C" {
void* __libc_malloc(size_t size_bytes);
void* __libc_calloc(size_t count, size_t size_bytes);
void* __libc_realloc(void* memory, size_t size_bytes);

__attribute__((visibility("default"))) void* malloc(size_t size_bytes) {
  tensord::bench::note(size_bytes);
  return __libc_malloc(size_bytes);
}
__attribute__((visibility("default"))) void* calloc(size_t count, size_t size_bytes) {
  tensord::bench::note(count * size_bytes);
  return __libc_calloc(count, size_bytes);
}
__attribute__((visibility("default"))) void* realloc(void* memory, size_t size_bytes) {
  tensord::bench::note(size_bytes);
  return __libc_realloc(memory, size_bytes);
}
}
#endif
