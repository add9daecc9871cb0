#include "gpu/pinned.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "memory/fresh_pages.h"

namespace tensord::gpu {

Result<std::shared_ptr<Primary>> Primary::retain(const Driver& driver, int device) {
  Handle handle = nullptr;
  TRY(driver.check(driver.retain(&handle, device), "begin to use a GPU"));
  std::shared_ptr<Primary> primary(new Primary(driver, device, handle));
  TRY(driver.check(driver.set_current(handle), "use a GPU"));
  return primary;
}

Primary::~Primary() { driver_.release(device_); }

Result<std::shared_ptr<Pinned>> Pinned::map(std::shared_ptr<Primary> primary, std::byte* segment, uint64_t size_bytes) {
  // Where huge pages are mapped as such: the driver takes each page that is mapped by itself.
  TRY_ASSIGN(std::byte * address, memory::reserve_addresses(size_bytes, memory::kHugePageBytes));
  // Of size 0: a second mapping of the same pages. mmap() would be refused, the segment is sealed.
  void* data = ::mremap(segment, 0, size_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, address);
  if (data == MAP_FAILED) {
    const int error = errno;
    ::munmap(address, size_bytes);
    return base::fail_errno(error, "map a segment for a GPU");
  }
  memory::Mapped mapped(static_cast<std::byte*>(data), size_bytes);
  std::shared_ptr<Pinned> pinned(new Pinned(std::move(primary), std::move(mapped)));
  return pinned;
}

Pinned::Pinned(std::shared_ptr<Primary> primary, memory::Mapped mapped)
    : primary_(std::move(primary)),
      mapped_(std::move(mapped)),
      parts_((mapped_.size_bytes() + kPinBytes - 1) / kPinBytes) {}

Pinned::~Pinned() {
  base::MutexLock lock(mutex_);
  const Current current(primary_->driver(), primary_->handle());
  for (size_t part = 0; part < parts_.size(); ++part) {
    if (parts_[part] == Part::registered) primary_->driver().host_unregister(mapped_.data() + part * kPinBytes);
  }
}

Result<const std::byte*> Pinned::at(uint64_t offset) {
  const size_t part = offset / kPinBytes;
  {
    base::MutexLock lock(mutex_);
    while (parts_[part] == Part::busy) lock.wait(settled_);
    if (parts_[part] == Part::registered) return mapped_.data() + offset;
    parts_[part] = Part::busy;
  }
  const uint64_t begin = part * kPinBytes;
  const uint64_t size_bytes = std::min(kPinBytes, mapped_.size_bytes() - begin);
  const Driver& driver = primary_->driver();
  const Current current(driver, primary_->handle());
  Status registered = driver.check(current.answer(), "use a GPU");
  if (registered) {
    Answer answer = driver.host_register(mapped_.data() + begin, size_bytes, kPortable);
    // Of a daemon before this one: it cannot be mapped for writing again.
    if (answer != 0) answer = driver.host_register(mapped_.data() + begin, size_bytes, kPortable | kHostReadOnly);
    registered = driver.check(answer, "register host memory with the GPU driver");
  }
  base::MutexLock lock(mutex_);
  parts_[part] = registered ? Part::registered : Part::plain;
  settled_.notify_all();
  TRY(registered);
  return mapped_.data() + offset;
}

bool Pinned::is_registered(uint64_t offset) {
  base::MutexLock lock(mutex_);
  return parts_[offset / kPinBytes] == Part::registered;
}

PinAhead::PinAhead(std::vector<Stretch> stretches) : stretches_(std::move(stretches)) {
  constexpr size_t kThreadCountMax = 4;
  const size_t thread_count = std::min(kThreadCountMax, stretches_.size());
  for (size_t at = 0; at < thread_count; ++at) threads_.emplace_back([this] { run(); });
}

PinAhead::~PinAhead() {
  stopping_ = true;
  for (std::thread& thread : threads_) thread.join();
}

void PinAhead::run() {
  for (size_t at = next_++; at < stretches_.size() && !stopping_; at = next_++) {
    const Stretch& stretch = stretches_[at];
    while (!stopping_ && !stretch.ready()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    // What fails here fails again where the bytes are needed, and is told there.
    if (!stopping_) (void)stretch.segment->at(stretch.offset);
  }
}

}  // namespace tensord::gpu
