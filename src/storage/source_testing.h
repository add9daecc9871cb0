// What the tests of sources share.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <string>
#include <vector>

#include "base/check.h"
#include "storage/source.h"

namespace tensord::storage {

// A folder that goes with its contents.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "tensord-XXXXXX").string();
    CHECK(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  std::string write(const std::string& name, std::span<const std::byte> bytes) const {
    const std::string path = path_ / name;
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    return path;
  }

 private:
  std::filesystem::path path_;
};

// Bytes that differ from file to file and from place to place.
inline std::vector<std::byte> sample_bytes(size_t size_bytes, uint32_t file = 0) {
  std::vector<std::byte> bytes(size_bytes);
  for (size_t i = 0; i < size_bytes; ++i) {
    bytes[i] = static_cast<std::byte>(((i + 1 + file * 977) * 2654435761u) >> 13);
  }
  return bytes;
}

inline std::future<Status> start_read(Source& source, uint32_t file, uint64_t offset, std::span<std::byte> target) {
  auto done = std::make_shared<std::promise<Status>>();
  source.read({file, offset, target, [done](Status status, ReadTiming) { done->set_value(std::move(status)); }});
  return done->get_future();
}

// Only for sources that do not hold reads.
inline Status read_now(Source& source, uint32_t file, uint64_t offset, std::span<std::byte> target) {
  return start_read(source, file, offset, target).get();
}

}  // namespace tensord::storage
