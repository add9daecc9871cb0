// Catalog: what is known about files beyond the life of a daemon, in one SQLite file in WAL mode.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/result.h"
#include "tensor/digest.h"

namespace tensord::catalog {

using base::Result;
using base::Status;

// What one file's bytes hashed to when they were first read. `layout_digest` guards against a change of
// the rules by which leaves are cut: entries with another value are not used.
struct FileRecord {
  base::FileIdentity identity;
  std::string path;  // the last path it was seen at; for people
  tensor::Digest layout_digest;
  std::vector<tensor::Digest> leaves;  // in file order; zeros where a leaf was never read
};

struct CatalogOptions {
  // What is not remembered again while so many others are is forgotten. A record is some 16 KiB a GiB.
  size_t file_count_max = 100'000;
  int busy_timeout_ms = 1000;  // how long a call waits for another process; then Code::unavailable
};

struct Connection;  // to SQLite, which stays in catalog.cc

// Not thread safe: used by one thread at a time. Errors: Code::exhausted (disk full), Code::denied, Code::corrupt
// (the database is damaged: names the file and says that it can be deleted), Code::unavailable; after any of them
// the catalog is as it was before the call.
class Catalog {
 public:
  static constexpr const char* kInMemory = ":memory:";  // a path: ends with the Catalog

  // Creates `path` (mode 0600) when missing; its folder must exist. Schema version in PRAGMA user_version: a newer
  // one is Code::unsupported, a damaged file or another program's database Code::corrupt, one that cannot be
  // written Code::denied. Several processes may have it open.
  static Result<std::unique_ptr<Catalog>> open(const std::string& path, const CatalogOptions& options = {});
  Catalog(std::unique_ptr<Connection> connection, size_t file_count_max);  // open's
  ~Catalog();

  // Of exactly this identity: a file that was written to since is absent.
  Result<std::optional<FileRecord>> find_file(const base::FileIdentity& identity);
  // All or nothing. Replaces the older records of the same files (equal device and inode).
  Status remember(const std::vector<FileRecord>& files);

 private:
  const std::unique_ptr<Connection> connection_;
  const size_t file_count_max_;
};

}  // namespace tensord::catalog
