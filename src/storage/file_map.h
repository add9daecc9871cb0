// A file's pages in the page cache as memory of this process. Others may cut the file at any time; who reads its pages
// then is told so, not killed.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace tensord::storage {

// Thread safe.
class FileMap {
 public:
  FileMap() = default;
  FileMap(int fd, uint64_t size_bytes);  // invalid where the system refuses the mapping, and for an empty file
  FileMap(FileMap&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_bytes_(other.size_bytes_) {}
  FileMap& operator=(FileMap&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_bytes_, other.size_bytes_);
    return *this;
  }
  ~FileMap();
  bool valid() const { return data_ != nullptr; }

  // Calls read(bytes) for a range of the file; its pages belong to this process only meanwhile. False: pages could not be
  // had, the file was cut or its disk failed; `read` then was not called, or saw zeros for them. Not from within `read`.
  template <typename Read>
  bool read_range(uint64_t offset, uint64_t size_bytes, const Read& read) {
    const std::span<const std::byte> bytes(data_ + offset, size_bytes);
    if (!enter(bytes)) return false;
    read(bytes);
    return leave(bytes);
  }

 private:
  bool enter(std::span<const std::byte> bytes);
  static bool leave(std::span<const std::byte> bytes);

  std::byte* data_ = nullptr;
  uint64_t size_bytes_ = 0;
};

}  // namespace tensord::storage
