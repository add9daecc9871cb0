#include "memory/mapped.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "base/bytes.h"

namespace tensord::memory {

namespace {
// FUTURE_WRITE leaves the mapping that is there writable and refuses every later one, and write().
constexpr int kSeals = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
}  // namespace

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

Result<SharedMemory> make_shared_memory(const char* name, uint64_t size_bytes, uint64_t alignment) {
  base::Fd fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid() || ::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0)
    return base::fail_errno(errno, "make the memory file ", name);
  TRY_ASSIGN(std::byte * address, reserve_addresses(size_bytes, alignment));
  Mapped mapped(address, size_bytes);
  if (::mmap(address, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd.get(), 0) == MAP_FAILED)
    return base::fail_errno(errno, "map the memory file ", name);
  if (::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) return base::fail_errno(errno, "seal the memory file ", name);
  return SharedMemory{std::move(fd), std::move(mapped)};
}

Result<Mapped> map_shared_memory(const base::Fd& fd, const char* what) {
  struct stat status;
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals || ::fstat(fd.get(), &status) != 0 || status.st_size == 0)
    return base::fail(base::Code::corrupt, what, " is not a sealed memory file");
  const auto size_bytes = static_cast<uint64_t>(status.st_size);
  void* data = ::mmap(nullptr, size_bytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) return base::fail_errno(errno, "map ", what);
  return Mapped(static_cast<std::byte*>(data), size_bytes);
}

}  // namespace tensord::memory
