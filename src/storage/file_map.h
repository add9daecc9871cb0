// A file's pages in the page cache as memory of this process. Others may cut the file at any time; who reads its pages
// then is told so, not killed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

namespace tensord::storage {

// Thread safe.
class FileMap {
 public:
  FileMap(int fd, uint64_t size_bytes);  // invalid where the system refuses the mapping, and for an empty file
  FileMap(const FileMap&) = delete;
  FileMap& operator=(const FileMap&) = delete;
  ~FileMap();
  bool valid() const { return data_ != nullptr; }

  // Calls read(bytes) for a range of the file; its pages belong to this process only meanwhile. False: pages could not be
  // had, the file was cut or its disk failed; `read` then was not called, or saw zeros for them. Not from within `read`.
  bool read_range(uint64_t offset, uint64_t size_bytes,
                  const std::function<void(std::span<const std::byte> bytes)>& read) const;

 private:
  std::byte* data_ = nullptr;
  const uint64_t size_bytes_;
};

}  // namespace tensord::storage
