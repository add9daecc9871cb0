#include "memory/mapped.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "base/bytes.h"

namespace tensord::memory {

Mapped& Mapped::operator=(Mapped&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

Mapped::~Mapped() {
  if (data_ != nullptr) ::munmap(data_, size_bytes_);
}

Status Mapped::move_to(std::byte* address) {
  if (address == data_) return {};
  void* moved = ::mremap(data_, size_bytes_, size_bytes_, MREMAP_MAYMOVE | MREMAP_FIXED, address);
  if (moved == MAP_FAILED) return base::fail_errno(errno, "move a mapping");
  data_ = address;
  return {};
}

Result<base::Fd> make_memory_file(const char* name, uint64_t size_bytes) {
  base::Fd fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid() || ::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0)
    return base::fail_errno(errno, "make the memory file ", name);
  return fd;
}

Result<std::byte*> reserve_addresses(uint64_t size_bytes, uint64_t alignment) {
  const uint64_t padded = size_bytes + alignment;
  void* range = ::mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) return base::fail_errno(errno, "reserve ", base::human_bytes(size_bytes), " of addresses");
  const auto begin = reinterpret_cast<uint64_t>(range);
  const uint64_t aligned = base::align_up(begin, alignment);
  if (aligned > begin) ::munmap(range, aligned - begin);
  const uint64_t behind = begin + padded - (aligned + size_bytes);
  if (behind > 0) ::munmap(reinterpret_cast<void*>(aligned + size_bytes), behind);
  return reinterpret_cast<std::byte*>(aligned);
}

}  // namespace tensord::memory
