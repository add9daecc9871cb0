#include "catalog/memory_catalog.h"

#include <algorithm>
#include <utility>

namespace tensord::catalog {

namespace {

class ScriptedCatalog final : public MemoryCatalog {
 public:
  explicit ScriptedCatalog(const CatalogLimits& limits) : limits_(limits) {}

  Result<std::optional<FileRecord>> find_file(const base::FileIdentity& identity) override {
    if (fault_) return tl::unexpected(*fault_);
    return find(files_, [&](const FileRecord& file) { return file.identity == identity; });
  }

  Result<std::optional<ArtifactRecord>> find_artifact(const tensor::Digest& id) override {
    if (fault_) return tl::unexpected(*fault_);
    return find(artifacts_, [&](const ArtifactRecord& artifact) { return artifact.id == id; });
  }

  Result<std::vector<ArtifactRecord>> list_artifacts() override {
    if (fault_) return tl::unexpected(*fault_);
    return std::vector<ArtifactRecord>(artifacts_.rbegin(), artifacts_.rend());
  }

  Status remember(const std::optional<ArtifactRecord>& artifact,
                  const std::vector<FileRecord>& files) override {
    if (fault_) return tl::unexpected(*fault_);
    for (const FileRecord& file : files) {
      std::erase_if(files_, [&](const FileRecord& older) {
        return older.identity.device == file.identity.device && older.identity.inode == file.identity.inode;
      });
      files_.push_back(file);
    }
    if (artifact) {
      std::erase_if(artifacts_, [&](const ArtifactRecord& older) { return older.id == artifact->id; });
      artifacts_.push_back(*artifact);
    }
    forget_oldest(files_, limits_.file_count_max);
    forget_oldest(artifacts_, limits_.artifact_count_max);
    return {};
  }

  void set_fault(std::optional<base::Error> fault) override { fault_ = std::move(fault); }

 private:
  template <typename Record, typename Predicate>
  static std::optional<Record> find(const std::vector<Record>& records, Predicate predicate) {
    const auto found = std::find_if(records.begin(), records.end(), predicate);
    if (found == records.end()) return std::nullopt;
    return *found;
  }

  template <typename Record>
  static void forget_oldest(std::vector<Record>& records, size_t count_max) {
    if (records.size() <= count_max) return;
    records.erase(records.begin(), records.end() - static_cast<ptrdiff_t>(count_max));
  }

  const CatalogLimits limits_;
  std::vector<FileRecord> files_;          // the last remembered last
  std::vector<ArtifactRecord> artifacts_;  // the last remembered last
  std::optional<base::Error> fault_;
};

}  // namespace

std::unique_ptr<MemoryCatalog> make_memory_catalog(const CatalogLimits& limits) {
  return std::make_unique<ScriptedCatalog>(limits);
}

}  // namespace tensord::catalog
