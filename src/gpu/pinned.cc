#include "gpu/pinned.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

namespace tensord::gpu {

Result<std::shared_ptr<Primary>> Primary::retain(const Driver& driver, int device) {
  Handle handle = nullptr;
  TRY(driver.check(driver.retain(&handle, device), "begin to use a GPU"));
  std::shared_ptr<Primary> primary(new Primary(driver, device, handle));
  TRY(driver.check(driver.set_current(handle), "use a GPU"));
  return primary;
}

Primary::~Primary() { driver_.release(device_); }

Result<std::shared_ptr<Pinned>> Pinned::map(std::shared_ptr<Primary> primary, std::byte* segment,
                                            uint64_t size_bytes) {
  // Of size 0: a second mapping of the same pages. mmap() would be refused, the segment is sealed.
  void* data = ::mremap(segment, 0, size_bytes, MREMAP_MAYMOVE);
  if (data == MAP_FAILED) return base::fail_errno(errno, "map a segment for a GPU");
  memory::Mapped mapped(static_cast<std::byte*>(data), size_bytes);
  std::shared_ptr<Pinned> pinned(new Pinned(std::move(primary), std::move(mapped)));
  return pinned;
}

Pinned::Pinned(std::shared_ptr<Primary> primary, memory::Mapped mapped)
    : primary_(std::move(primary)),
      mapped_(std::move(mapped)),
      registered_((mapped_.size_bytes() + kPinBytes - 1) / kPinBytes) {}

Pinned::~Pinned() {
  base::MutexLock lock(mutex_);
  const Current current(primary_->driver(), primary_->handle());
  for (size_t part = 0; part < registered_.size(); ++part) {
    if (registered_[part]) primary_->driver().host_unregister(mapped_.data() + part * kPinBytes);
  }
}

Result<const std::byte*> Pinned::at(uint64_t offset) {
  base::MutexLock lock(mutex_);
  const size_t part = offset / kPinBytes;
  if (!registered_[part]) {
    const uint64_t begin = part * kPinBytes;
    const uint64_t part_bytes = std::min(kPinBytes, mapped_.size_bytes() - begin);
    const Driver& driver = primary_->driver();
    const Current current(driver, primary_->handle());
    TRY(driver.check(current.answer(), "use a GPU"));
    TRY(driver.check(driver.host_register(mapped_.data() + begin, part_bytes, kPortable),
                     "register host memory with the GPU driver"));
    registered_[part] = true;
  }
  return mapped_.data() + offset;
}

}  // namespace tensord::gpu
