// Model: a checkpoint as one client sees it: its index, the replica mapped into this process, and copies out of it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/result.h"
#include "client/connection.h"
#include "memory/copy.h"
#include "memory/fill_map.h"
#include "tensor/blocks.h"
#include "tensor/index.h"
#include "tensor/plan.h"
#include "tensor/safetensors.h"
#include "tensor/view.h"

namespace tensord::client {

// The replica's segments at consecutive addresses of this process, private copy-on-write, and the lease that keeps
// them in the daemon. Both go with the last reference. Thread safe; may outlive its Model.
class Mapping {
 public:
  Mapping(memory::Mapped memory, bool writable, base::Fd lease)
      : memory_(std::move(memory)), writable_(writable), lease_(std::move(lease)) {}
  std::byte* data() const { return memory_.data(); }
  uint64_t size_bytes() const { return memory_.size_bytes(); }
  // False where strict overcommit refused so much private memory: a write into it is a SIGSEGV.
  bool writable() const { return writable_; }
  // False once the daemon that holds the other end of the lease is gone.
  bool daemon_lives() const;

 private:
  memory::Mapped memory_;
  bool writable_;
  base::Fd lease_;
};

// The files behind what a caller named.
struct Checkpoint {
  std::string path;                          // absolute, as the caller named it (the first file of a list)
  std::vector<std::string> files;            // absolute
  std::vector<base::Fd> fds;                 // of the files, open for reading
  std::optional<tensor::ShardIndex> shards;  // of model.safetensors.index.json, when there is one
};

// One path: a file, an index.json, or a folder that holds model.safetensors.index.json, model.safetensors, or exactly
// one *.safetensors. Several paths: files. Code::not_found, Code::denied, Code::invalid_argument (FIFO, device, empty
// folder, ...), Code::corrupt (index.json) name the path.
Result<Checkpoint> find_checkpoint(const std::vector<std::string>& paths);

struct OpenOptions {
  Autostart autostart = Autostart::from_environment;
  bool index_only = false;  // headers only
};

// One slice of a tensor and where it goes: element (0, 0, ..) to `target`, the others by the strides of `to` (its
// offset is not used).
struct CopyOrder {
  std::string_view name;
  tensor::IndexItems items;
  std::byte* target = nullptr;
  tensor::Strided to;
  tensor::Dtype target_dtype = tensor::Dtype::u8;
};

struct CopyOrderOptions {
  bool cast = false;
  int thread_count = 0;
};

struct LoadReport {
  memory::CopyReport copy;
  uint64_t record_count = 0;
  int64_t begin_ns = 0;
  int64_t plan_ns = 0;
  int64_t copy_ns = 0;
};

// Thread safe.
class Model {
 public:
  static Result<std::shared_ptr<Model>> open(const std::vector<std::string>& paths,
                                             const OpenOptions& options);

  const std::string& path() const { return path_; }
  const tensor::Index& index() const { return index_; }
  uint64_t replica() const { return replica_; }
  uint64_t image_bytes() const { return image_bytes_; }

  // nullptr with index_only.
  const std::shared_ptr<Mapping>& mapping() const { return mapping_; }
  // Where a tensor's bytes are (or will be); nullptr with index_only.
  const std::byte* data(const tensor::Tensor& tensor) const;

  memory::FillState state() const;
  uint64_t ready_bytes() const;
  uint64_t total_bytes() const;
  tensor::Digest artifact_id() const;  // zeros until ready

  // Until a tensor's bytes (nullptr: all) are there; errors as FillView::wait.
  Status wait(const tensor::Tensor* tensor, int64_t timeout_ms) const;

  // Code::not_found, with the nearest names.
  Result<const tensor::Tensor*> find(std::string_view name) const;

  // One plan for all orders; checked whole before the first byte is written. Errors as memory::execute, and
  // Code::not_found, Code::invalid_argument for orders that make no sense.
  Result<LoadReport> load_into(std::span<const CopyOrder> orders, const CopyOrderOptions& options);

  // The JSON of tensord_info.
  std::string info_json() const;

 private:
  Model() = default;
  struct Prepared {
    tensor::CopyPlan plan;
    memory::CopyTarget target;  // the stretch of addresses that holds all orders' targets
  };
  Result<Prepared> prepare(std::span<const CopyOrder> orders, const CopyOrderOptions& options) const;
  Status wait_for(uint64_t image_offset, uint64_t size_bytes, int64_t timeout_ms) const;
  const tensor::ImageLayout& layout() const;  // computed at first need
  void report_use(const LoadReport& report);

  // Constant after open():
  std::string path_;
  tensor::Index index_;
  uint64_t replica_ = 0;
  uint64_t image_bytes_ = 0;
  int64_t map_begin_ns_ = 0;
  int64_t map_ns_ = 0;
  std::vector<uint64_t> file_offsets_;  // and behind them the size of the image
  std::unique_ptr<Connection> connection_;
  std::shared_ptr<Mapping> mapping_;
  std::optional<memory::FillView> fill_;

  mutable base::Mutex mutex_;
  mutable std::optional<tensor::ImageLayout> layout_ GUARDED_BY(mutex_);
};

}  // namespace tensord::client
