// Shared memory files and their mappings.
#pragma once

#include <cstdint>
#include <utility>

#include "base/fd.h"
#include "base/result.h"

namespace tensord::memory {

using base::Result;
using base::Status;

// A mapping of shared memory, unmapped when it goes.
class Mapped {
 public:
  Mapped() = default;
  Mapped(std::byte* data, uint64_t size_bytes) : data_(data), size_bytes_(size_bytes) {}
  Mapped(Mapped&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_bytes_(std::exchange(other.size_bytes_, 0)) {}
  Mapped& operator=(Mapped&& other) noexcept;
  ~Mapped();
  std::byte* data() const { return data_; }
  uint64_t size_bytes() const { return size_bytes_; }

  // With its page tables, to `address` (reserved by the caller).
  Status move_to(std::byte* address);

 private:
  std::byte* data_ = nullptr;
  uint64_t size_bytes_ = 0;
};

// Addresses without memory behind them, from a multiple of `alignment` (a power of two, of pages) on.
Result<std::byte*> reserve_addresses(uint64_t size_bytes, uint64_t alignment);

// A memfd with the only mapping for writing that there can be: sealed so that nobody else maps it so, shrinks or grows it.
struct SharedMemory {
  base::Fd fd;
  Mapped mapped;
};
// Mapped from a multiple of `alignment` on.
Result<SharedMemory> make_shared_memory(const char* name, uint64_t size_bytes, uint64_t alignment);

// The same memory in another process, for reading. Code::corrupt, naming `what`, unless it is sealed as above.
Result<Mapped> map_shared_memory(const base::Fd& fd, const char* what);

}  // namespace tensord::memory
