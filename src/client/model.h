// Model: a checkpoint as one client sees it: its index, the replica mapped into this process, and copies out of it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/fd.h"
#include "base/result.h"
#include "client/connection.h"
#include "client/device_copy.h"
#include "gpu/target_memory.h"
#include "memory/copy.h"
#include "memory/fill_map.h"
#include "tensor/blocks.h"
#include "tensor/index.h"
#include "tensor/plan.h"
#include "tensor/safetensors.h"
#include "tensor/view.h"
#include "tensord/tensord.h"

namespace tensord::client {

// The replica's segments at consecutive addresses of this process, private copy-on-write, and the lease that keeps
// them in the daemon. Both go with the last reference. Thread safe; may outlive its Model.
class Mapping {
 public:
  struct Bytes {
    std::byte* data = nullptr;  // in host memory, or on a device for reading alone; nullptr: they are only held
    uint64_t size_bytes = 0;
    bool writable = true;
    std::shared_ptr<const void> owner;
  };
  Mapping(Bytes bytes, base::Fd lease) : lease_(std::move(lease)), bytes_(std::move(bytes)) {}
  std::byte* data() const { return bytes_.data; }
  uint64_t size_bytes() const { return bytes_.size_bytes; }
  // False where strict overcommit refused so much private memory: a write into it is a SIGSEGV.
  bool writable() const { return bytes_.writable; }
  // Code::unavailable once the daemon that holds the other end of the lease is gone.
  Status check_daemon() const;

 private:
  const base::Fd lease_;  // ends when the memory is unmapped
  const Bytes bytes_;
};

// The files behind what a caller named.
struct Checkpoint {
  std::string path;                            // absolute, as the caller named it (the first file of a list)
  std::vector<std::string> files;              // absolute
  std::vector<base::Fd> fds;                   // of the files, open for reading
  std::vector<base::FileIdentity> identities;  // of the files, when they were opened
  std::optional<tensor::ShardIndex> shards;    // of model.safetensors.index.json, when there is one
};

// One path: a file, an index.json, or a folder that holds model.safetensors.index.json, model.safetensors, or exactly
// one *.safetensors. Several paths: files. Code::not_found, Code::denied, Code::invalid_argument (FIFO, device, empty
// folder, ...), Code::corrupt (index.json) name the path.
Result<Checkpoint> find_checkpoint(const std::vector<std::string>& paths);

// What of an artifact is in the daemon's memory: all of it, or, batch by batch, what a call is about to copy.
enum class Resident : uint8_t { artifact, view };

struct OpenOptions {
  Autostart autostart = Autostart::from_environment;
  bool index_only = false;        // headers only
  std::vector<std::string> only;  // names and patterns of the tensors that are wanted; empty: all
  std::string device;             // "cuda:0" or a GPU's UUID: in whose memory they are wanted; empty: in the host's
  bool hold_only = false;         // on a device: this process reads nothing, and maps nothing
  Resident resident = Resident::artifact;
  int64_t memory_wait_ms = 0;       // 0: as the daemon's setting says, -1: not at all
  const int32_t* cancel = nullptr;  // as memory::CopyOptions, while the daemon's answer is waited for
};

// A tensord_copy, checked and resolved.
struct CopyOrder {
  const tensor::Tensor* tensor = nullptr;
  tensor::Wanted wanted;        // from the tensor's first byte, to addresses
  uint64_t begin = 0, end = 0;  // addresses that the target can touch; none: equal
  bool on_device = false;       // the target is GPU memory for sure; else it is found out
};

struct LoadReport {
  memory::CopyReport copy;
  uint64_t record_count = 0;
  int64_t begin_ns = 0;
  int64_t plan_ns = 0;
  int64_t copy_ns = 0;
  protocol::CopiedToDeviceT device;
  std::string left_out_why;

  void add(const LoadReport& part);  // but for spans and devices
};

// Code::invalid_argument for kinds that are unknown.
Result<tensor::IndexItems> to_items(const tensord_index_item* items, size_t count);

// Thread safe.
class Model {
 public:
  // Opens with Resident::view, whatever the options say, what is larger than the daemon's host_memory.
  static Result<std::shared_ptr<Model>> open(const std::vector<std::string>& paths, const OpenOptions& options);

  // Some of this model's tensors, in memory as long as somebody maps them. For Resident::view; Code::changed when the
  // files are not those that this model was opened for.
  Result<std::shared_ptr<Model>> open_part(std::vector<std::string> names) const;

  const std::string& path() const { return path_; }
  const tensor::Index& index() const { return index_; }
  uint64_t replica() const { return replica_; }
  Resident resident() const { return resident_; }
  uint64_t image_bytes() const { return windows_.image_bytes; }
  bool on_device() const { return on_device_; }

  // nullptr with index_only and Resident::view.
  const std::shared_ptr<Mapping>& mapping() const { return mapping_; }
  // Where a tensor's bytes are (or will be); nullptr where there is no mapping.
  const std::byte* data(const tensor::Tensor& tensor) const;

  memory::FillState state() const;
  uint64_t ready_bytes() const;
  uint64_t total_bytes() const;
  // Zeros until ready, and where the mapped replica holds more tensors than this model.
  tensor::Digest artifact_id() const;

  // Until a tensor's bytes (nullptr: all) are there; errors as FillView::wait. At once with Resident::view.
  Status wait(const tensor::Tensor* tensor, int64_t timeout_ms) const;

  // Code::not_found, with the nearest names.
  Result<const tensor::Tensor*> find(std::string_view name) const;

  // One plan for all copies; checked whole before the first byte is written. Errors as memory::execute, and
  // Code::not_found, Code::invalid_argument for copies that make no sense. With Resident::view the tensors are read in
  // batches, one ahead of the one that is copied; Code::exhausted for one that is larger than host_memory. Dtypes and
  // ranks are such as there are, and what must not be NULL is not.
  Result<LoadReport> load_into(std::span<const tensord_copy> copies, const tensord_copy_options& options);

  // The JSON of tensord_info.
  std::string info_json() const;

 private:
  Model() = default;
  using Parts = std::map<uint32_t, std::vector<CopyOrder>>;  // by number of the batch
  static Result<std::shared_ptr<Model>> ask(std::shared_ptr<Connection> connection, const Checkpoint& checkpoint,
                                            const OpenOptions& options, protocol::Stay stay);
  Status adopt(const Checkpoint& checkpoint, const OpenOptions& options, Answer answer);
  Result<std::shared_ptr<Model>> open_part(std::shared_ptr<Connection> connection, std::vector<std::string> names,
                                           protocol::Stay stay, const int32_t* cancel = nullptr) const;
  Result<CopyOrder> order_of(const tensord_copy& copy, const tensord_copy_options& options) const;
  Result<Parts> cut(const std::vector<CopyOrder>& orders) const;
  Result<LoadReport> copy_to_host(std::vector<CopyOrder> orders, const tensord_copy_options& options);
  Result<LoadReport> copy_mixed(const gpu::Driver* driver, std::vector<CopyOrder> orders,
                                const tensord_copy_options& options);
  Result<LoadReport> copy_mapped(std::vector<CopyOrder> orders, const tensord_copy_options& options);
  Result<LoadReport> copy_streamed(const std::vector<CopyOrder>& orders, const tensord_copy_options& options) const;
  struct Prepared {
    tensor::CopyPlan plan;
    std::span<std::byte> target;  // the stretch of addresses that holds all orders' targets
  };
  Result<Prepared> prepare(std::vector<CopyOrder> orders) const;
  Status wait_for(uint64_t image_offset, uint64_t size_bytes, int64_t timeout_ms,
                  const int32_t* cancel = nullptr) const;
  const tensor::ImageLayout& layout() const;  // computed at first need
  void report_use(const LoadReport& report);

  // Constant after open():
  std::string path_;
  tensor::Index index_;
  std::vector<std::string> only_;         // as asked for
  std::optional<tensor::Index> granted_;  // of the replica, where it holds more tensors
  tensor::Windows windows_;               // of the replica's image
  Resident resident_ = Resident::artifact;
  bool on_device_ = false;
  Checkpoint checkpoint_;  // with Resident::view, to open parts
  uint64_t replica_ = 0;
  uint64_t batch_bytes_ = 0;
  uint64_t memory_bytes_max_ = 0;
  int64_t map_begin_ns_ = 0;
  int64_t map_ns_ = 0;
  std::shared_ptr<Connection> connection_;
  std::unique_ptr<DeviceConnections> device_connections_;
  std::shared_ptr<Mapping> mapping_;
  std::optional<memory::FillView> fill_;

  mutable base::Mutex mutex_;
  mutable std::optional<tensor::ImageLayout> layout_ GUARDED_BY(mutex_);
};

}  // namespace tensord::client
