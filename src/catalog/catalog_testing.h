// What the tests of catalogs share.
#pragma once

#include <gtest/gtest.h>
#include <sqlite3.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"
#include "base/text.h"
#include "catalog/catalog.h"

namespace tensord::catalog {

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

  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// Runs SQL as someone else who has the file open.
class Stranger {
 public:
  explicit Stranger(const std::string& path) { CHECK(sqlite3_open(path.c_str(), &database_) == SQLITE_OK); }
  ~Stranger() { sqlite3_close(database_); }
  Stranger(const Stranger&) = delete;
  Stranger& operator=(const Stranger&) = delete;

  void execute(const std::string& sql) {
    ASSERT_EQ(sqlite3_exec(database_, sql.c_str(), nullptr, nullptr, nullptr), SQLITE_OK)
        << sql << ": " << sqlite3_errmsg(database_);
  }

 private:
  sqlite3* database_ = nullptr;
};

inline tensor::Digest sample_digest(uint8_t first) {
  tensor::Digest digest;
  for (size_t i = 0; i < digest.bytes.size(); ++i) digest.bytes[i] = static_cast<std::byte>(first + i);
  return digest;
}

inline base::FileIdentity sample_identity(uint64_t inode) {
  return {.device = 42, .inode = inode, .size_bytes = 1000 + inode, .mtime_ns = 1'700'000'000'000'000'000};
}

inline FileRecord sample_file(uint64_t inode, size_t leaf_count = 3) {
  FileRecord file{sample_identity(inode), base::text("/models/", inode), sample_digest(7), {}};
  for (size_t i = 0; i < leaf_count; ++i) file.leaves.push_back(sample_digest(static_cast<uint8_t>(inode + i)));
  return file;
}

// Records as text, to compare them.
inline std::string to_text(const base::FileIdentity& file) {
  return base::text(file.device, "/", file.inode, "/", file.size_bytes, "/", file.mtime_ns);
}
inline std::string to_text(const tensor::Digest& digest) { return base::to_hex(digest.bytes.data(), 16); }
inline std::string to_text(const FileRecord& file) {
  std::string out = base::text(to_text(file.identity), " ", file.path, " layout ", to_text(file.layout_digest));
  for (const tensor::Digest& leaf : file.leaves) out += base::text("\n  ", to_text(leaf));
  return out;
}
template <typename Record>
std::string to_text(const Result<std::optional<Record>>& found) {
  if (!found) return base::text(base::code_name(found.error().code), ": ", found.error().message);
  return *found ? to_text(**found) : "absent";
}

}  // namespace tensord::catalog
