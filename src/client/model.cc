#include "client/model.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "memory/fresh_pages.h"
#include "rpc/index_rows.h"
#include "tensor/plan.h"

namespace tensord::client {

using base::Code;
using base::fail;

namespace {

struct MappedSegments {
  memory::Mapped memory;
  bool writable = true;
};

// Maps the segments one after another, private copy-on-write. Where strict overcommit refuses so much writable
// private memory, read-only.
Result<MappedSegments> map_segments(std::span<base::Fd> segments, const flatbuffers::Vector<uint64_t>& sizes,
                                    uint64_t image_bytes) {
  uint64_t total_bytes = 0;
  for (size_t at = 0; at < segments.size(); ++at) {
    struct stat status;
    const auto wanted = static_cast<off_t>(sizes[at]);
    constexpr int kSeals = F_SEAL_GROW | F_SEAL_SHRINK;
    const int seals = ::fcntl(segments[at].get(), F_GET_SEALS);
    const auto sum = base::checked_add(total_bytes, sizes[at]);
    if (::fstat(segments[at].get(), &status) != 0 || status.st_size != wanted || sizes[at] % 4096 != 0 ||
        (seals & kSeals) != kSeals || seals < 0 || !sum) {
      return fail(Code::corrupt,
                  "the daemon sent a segment that is not sealed, or of another size than it tells");
    }
    total_bytes = *sum;
  }
  if (total_bytes < image_bytes) return fail(Code::corrupt, "the daemon sent too few segments");
  if (total_bytes == 0) return MappedSegments();
  // At a multiple of huge pages, so that those of the segments are mapped as such.
  const uint64_t padded = total_bytes + memory::kHugePageBytes;
  void* range = ::mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) {
    return tl::unexpected(
        base::errno_error("reserve " + base::human_bytes(total_bytes) + " of addresses", errno));
  }
  const auto begin = reinterpret_cast<uint64_t>(range);
  const uint64_t aligned = base::align_up(begin, memory::kHugePageBytes);
  if (aligned > begin) ::munmap(range, aligned - begin);
  ::munmap(reinterpret_cast<void*>(aligned + total_bytes), begin + padded - aligned - total_bytes);
  MappedSegments mapped{memory::Mapped(reinterpret_cast<std::byte*>(aligned), total_bytes)};
  std::byte* address = mapped.memory.data();
  for (size_t at = 0; at < segments.size(); ++at) {
    constexpr int kFlags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    const int fd = segments[at].get();
    if (::mmap(address, sizes[at], PROT_READ | PROT_WRITE, kFlags, fd, 0) == MAP_FAILED) {
      mapped.writable = false;
      if (::mmap(address, sizes[at], PROT_READ, kFlags, fd, 0) == MAP_FAILED)
        return tl::unexpected(base::errno_error("map a segment", errno));
    }
    address += sizes[at];
  }
  return mapped;
}

// The daemon names files as their first client did; here they are named as this one does, and held against its index.json.
Status adopt_names(const Checkpoint& checkpoint, tensor::Index& index) {
  if (index.files.size() != checkpoint.files.size()) {
    return fail(Code::corrupt, "the daemon's index has another number of files than were opened");
  }
  for (size_t at = 0; at < index.files.size(); ++at) index.files[at].path = checkpoint.files[at];
  if (!checkpoint.shards) return {};
  const Status fits = tensor::check_shard_index(*checkpoint.shards, index);
  if (!fits) return fail(fits.error().code, checkpoint.path + ": " + fits.error().message);
  return {};
}

uint64_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<uint64_t> row(b.size() + 1);
  for (size_t at = 0; at < row.size(); ++at) row[at] = at;
  for (size_t i = 1; i <= a.size(); ++i) {
    uint64_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const uint64_t changed = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, changed});
    }
  }
  return row[b.size()];
}

// " did you mean 'x'?" for names that are nearly right.
std::string suggestion(const tensor::Index& index, std::string_view name) {
  constexpr size_t kNameMax = 200;
  constexpr size_t kTriedMax = 2000;  // a message is not worth more than a few ms
  if (name.size() > kNameMax) return "";
  uint64_t best = name.size() / 3 + 1;
  const tensor::Tensor* nearest = nullptr;
  for (size_t at = 0; at < std::min(index.tensors.size(), kTriedMax); ++at) {
    if (index.tensors[at].name.size() > kNameMax) continue;
    const uint64_t distance = edit_distance(name, index.tensors[at].name);
    if (distance < best) {
      best = distance;
      nearest = &index.tensors[at];
    }
  }
  return nearest == nullptr ? "" : "; did you mean " + base::quoted(nearest->name) + "?";
}

// [begin, end) of what a target can touch.
struct AddressRange {
  uint64_t begin = UINT64_MAX;
  uint64_t end = 0;
  bool empty() const { return begin >= end; }
};

Result<AddressRange> addresses_of(const CopyOrder& order) {
  if (order.to.shape.size() != order.to.strides.size()) {
    return fail(Code::invalid_argument,
                base::text(base::quoted(order.name), ": target with ", order.to.shape.size(),
                           " dimensions and ", order.to.strides.size(), " strides"));
  }
  if (order.to.element_count() == 0) return AddressRange{};
  constexpr __int128 kFarMax = static_cast<__int128>(1) << 64;  // 64 dimensions of it do not overflow
  auto lowest = static_cast<__int128>(reinterpret_cast<uint64_t>(order.target));
  __int128 highest = lowest + order.to.element_bytes;
  for (size_t dimension = 0; dimension < order.to.shape.size(); ++dimension) {
    const __int128 reach = static_cast<__int128>(order.to.shape[dimension] - 1) * order.to.strides[dimension];
    (reach < 0 ? lowest : highest) += std::clamp(reach, -kFarMax, kFarMax);
  }
  if (order.target == nullptr || lowest <= 0 || highest > UINT64_MAX) {
    return fail(Code::invalid_argument, base::text(base::quoted(order.name), ": the target is no memory"));
  }
  return AddressRange{static_cast<uint64_t>(lowest), static_cast<uint64_t>(highest)};
}

Status check_dtypes(const tensor::Tensor& tensor, tensor::Dtype target, bool cast) {
  if (target == tensor.dtype) return {};
  const std::string pair = base::text(base::quoted(tensor.name), " is ", tensor.dtype_text, ", its target ",
                                      tensor::dtype_name(target));
  if (!cast) return fail(Code::invalid_argument, pair + "; ask for a cast to convert");
  if (!tensor::can_cast(tensor.dtype, target))
    return fail(Code::unsupported, pair + "; there is no such cast");
  return {};
}

}  // namespace

bool Mapping::daemon_lives() const {
  pollfd lease{lease_.get(), 0, 0};
  return ::poll(&lease, 1, 0) == 0;  // an error event: the daemon's read end is closed
}

Result<std::shared_ptr<Model>> Model::open(const std::vector<std::string>& paths,
                                           const OpenOptions& options) {
  TRY_ASSIGN(Checkpoint checkpoint, find_checkpoint(paths));
  std::shared_ptr<Model> model(new Model);
  TRY_ASSIGN(model->connection_, Connection::open(options.autostart));
  protocol::OpenT body;
  body.path = checkpoint.path;
  body.paths = checkpoint.files;
  body.index_only = options.index_only;
  protocol::RequestUnion request;
  request.Set(std::move(body));
  TRY_ASSIGN(Answer answer, model->connection_->ask(std::move(request), std::move(checkpoint.fds)));

  const int64_t begin_ns = base::monotonic_ns();
  const auto* opened = answer.frame().reply_as_Opened();
  const size_t segment_count =
      opened == nullptr || opened->segment_bytes() == nullptr ? 0 : opened->segment_bytes()->size();
  constexpr size_t kLeaseFillIndex = 3;
  const size_t fd_count = options.index_only ? 1 : kLeaseFillIndex + segment_count;
  if (opened == nullptr || answer.fds.size() != fd_count) {
    return fail(Code::corrupt, "the daemon answered something else than an opened artifact");
  }
  model->path_ = checkpoint.path;
  model->replica_ = opened->replica();
  model->image_bytes_ = opened->image_bytes();
  const base::Fd& index_fd = answer.fds[options.index_only ? 0 : kLeaseFillIndex - 1];
  TRY_ASSIGN(model->index_, rpc::decode_index(index_fd, opened->index_bytes()));
  TRY(adopt_names(checkpoint, model->index_));
  model->file_offsets_ = tensor::file_offsets(model->index_);
  if (options.index_only) return model;
  if (model->file_offsets_.back() != model->image_bytes_) {
    return fail(Code::corrupt, "the daemon's image is of another size than the files in it");
  }
  TRY_ASSIGN(model->fill_, memory::FillView::open(answer.fds[1]));
  static const flatbuffers::Vector<uint64_t>* const kNone = nullptr;
  const auto* sizes = segment_count == 0 ? kNone : opened->segment_bytes();
  MappedSegments mapped;
  if (sizes != nullptr) {
    TRY_ASSIGN(mapped,
               map_segments(std::span(answer.fds).subspan(kLeaseFillIndex), *sizes, model->image_bytes_));
  }
  model->mapping_ =
      std::make_shared<Mapping>(std::move(mapped.memory), mapped.writable, std::move(answer.fds[0]));
  model->map_begin_ns_ = begin_ns;
  model->map_ns_ = base::monotonic_ns() - begin_ns;
  return model;
}

const std::byte* Model::data(const tensor::Tensor& tensor) const {
  if (mapping_ == nullptr) return nullptr;
  return mapping_->data() + file_offsets_[tensor.file] + tensor.offset;
}

memory::FillState Model::state() const { return fill_ ? fill_->state() : memory::FillState::filling; }
uint64_t Model::ready_bytes() const { return fill_ ? fill_->ready_bytes() : 0; }
uint64_t Model::total_bytes() const { return fill_ ? fill_->total_bytes() : image_bytes_; }
tensor::Digest Model::artifact_id() const { return fill_ ? fill_->artifact_id() : tensor::Digest{}; }

const tensor::ImageLayout& Model::layout() const {
  base::MutexLock lock(mutex_);
  if (!layout_) layout_ = tensor::lay_out(index_);
  return *layout_;
}

Status Model::wait_for(uint64_t image_offset, uint64_t size_bytes, int64_t timeout_ms) const {
  if (!fill_) return fail(Code::invalid_argument, path_ + " was opened for its index only");
  if (fill_->state() == memory::FillState::ready || size_bytes == 0) return {};
  const tensor::ImageLayout& cut = layout();
  if (cut.blocks.size() != fill_->block_count()) {
    return fail(Code::corrupt, "daemon and client cut blocks differently; are they of one version?");
  }
  const auto [first, last] = cut.blocks_of(image_offset, size_bytes);
  if (fill_->has_blocks(first, last) && fill_->state() != memory::FillState::failed) return {};
  // What is read in file order comes soon; what is not there by then is asked for.
  constexpr int64_t kPatienceMs = 20;
  const auto alive = [this] { return mapping_->daemon_lives(); };
  const bool patient = timeout_ms < 0 || timeout_ms > kPatienceMs;
  Status there = fill_->wait(first, last, patient ? kPatienceMs : timeout_ms, alive);
  if (there || fill_->state() != memory::FillState::filling || !alive() || !patient) return there;
  protocol::RequestUnion request;
  protocol::WantT want;
  want.replica = replica_;
  want.first_block = first;
  want.last_block = last;
  request.Set(std::move(want));
  connection_->tell(std::move(request));
  return fill_->wait(first, last, timeout_ms < 0 ? timeout_ms : timeout_ms - kPatienceMs, alive);
}

Status Model::wait(const tensor::Tensor* tensor, int64_t timeout_ms) const {
  if (tensor != nullptr) {
    return wait_for(file_offsets_[tensor->file] + tensor->offset, tensor->size_bytes, timeout_ms);
  }
  if (!fill_) return fail(Code::invalid_argument, path_ + " was opened for its index only");
  return fill_->wait_ready(timeout_ms, [this] { return mapping_->daemon_lives(); });
}

Result<const tensor::Tensor*> Model::find(std::string_view name) const {
  const tensor::Tensor* tensor = index_.find(name);
  if (tensor == nullptr) {
    return fail(Code::not_found,
                base::text(path_, " has no tensor ", base::quoted(name), suggestion(index_, name)));
  }
  return tensor;
}

Result<Model::Prepared> Model::prepare(std::span<const CopyOrder> orders,
                                       const CopyOrderOptions& options) const {
  // All targets are one memory, from the lowest address to the highest: overlaps between orders show as in one target.
  AddressRange all;
  for (const CopyOrder& order : orders) {
    TRY_ASSIGN(const AddressRange range, addresses_of(order));
    if (range.empty()) continue;
    const auto mapped = reinterpret_cast<uint64_t>(mapping_->data());
    if (range.begin < mapped + mapping_->size_bytes() && mapped < range.end) {
      return fail(Code::invalid_argument, base::text("load_into ", base::quoted(order.name),
                                                     ": the target is a tensor of the model itself"));
    }
    all.begin = std::min(all.begin, range.begin);
    all.end = std::max(all.end, range.end);
  }
  std::vector<tensor::Wanted> wanted;
  for (const CopyOrder& order : orders) {
    TRY_ASSIGN(const tensor::Tensor* tensor, find(order.name));
    TRY(check_dtypes(*tensor, order.target_dtype, options.cast));
    TRY_ASSIGN(tensor::Strided from,
               tensor::resolve(*tensor, order.items, file_offsets_[tensor->file] + tensor->offset));
    wanted.push_back({.label = order.name,
                      .from = std::move(from),
                      .to = order.to,
                      .source_dtype = tensor->dtype,
                      .target_dtype = order.target_dtype});
    tensor::Strided& to = wanted.back().to;
    to.offset = to.element_count() == 0 ? 0 : reinterpret_cast<uint64_t>(order.target) - all.begin;
  }
  Prepared prepared;
  TRY_ASSIGN(prepared.plan, tensor::compile(wanted));
  if (!all.empty()) prepared.target = {reinterpret_cast<std::byte*>(all.begin), all.end - all.begin};
  const uint64_t source_bytes[] = {mapping_->size_bytes()};
  const uint64_t target_bytes[] = {prepared.target.size_bytes};
  TRY(tensor::check_plan(prepared.plan, source_bytes, target_bytes, tensor::Coverage::any));
  return prepared;
}

Result<LoadReport> Model::load_into(std::span<const CopyOrder> orders, const CopyOrderOptions& options) {
  if (mapping_ == nullptr) return fail(Code::invalid_argument, path_ + " was opened for its index only");
  const int64_t begin_ns = base::monotonic_ns();
  TRY_ASSIGN(const Prepared prepared, prepare(orders, options));
  LoadReport report{.begin_ns = begin_ns};
  report.record_count = prepared.plan.records.size();
  report.plan_ns = base::monotonic_ns() - begin_ns;
  memory::CopyOptions run{.thread_count = options.thread_count, .keep_spans = connection_->keep_spans()};
  if (fill_->state() != memory::FillState::ready) {
    run.ready = [this](uint32_t, uint64_t offset, uint64_t size_bytes) {
      return wait_for(offset, size_bytes, -1);
    };
  }
  const memory::CopySource sources[] = {{mapping_->data(), mapping_->size_bytes()}};
  const memory::CopyTarget targets[] = {prepared.target};
  TRY_ASSIGN(report.copy, memory::execute(prepared.plan, sources, targets, run));
  report.copy_ns = base::monotonic_ns() - begin_ns - report.plan_ns;
  report_use(report);
  return report;
}

void Model::report_use(const LoadReport& report) {
  if (!mapping_->daemon_lives()) return;  // a process with its pid may be there again
  protocol::UsedT used;
  used.replica = replica_;
  used.begin_ns = report.begin_ns;
  used.map_begin_ns = map_begin_ns_;
  used.map_ns = map_ns_;
  used.plan_ns = report.plan_ns;
  used.wait_ns = report.copy.wait_ns;
  used.copy_ns = report.copy_ns;
  used.copy_bytes = report.copy.target_bytes;
  used.record_count = report.record_count;
  used.thread_count = report.copy.thread_count;
  constexpr size_t kSpanCountMax = 1 << 20;  // 32 MiB, below the limit of a frame
  for (const memory::CopySpan& span : report.copy.spans) {
    if (used.spans.size() == kSpanCountMax) break;
    used.spans.emplace_back(span.begin_ns, span.end_ns, span.thread, span.record, span.size_bytes);
  }
  protocol::RequestUnion request;
  request.Set(std::move(used));
  connection_->tell(std::move(request));
}

std::string Model::info_json() const {
  static constexpr const char* kStates[] = {"filling", "ready", "failed"};
  nlohmann::json info = {{"path", path_},
                         {"replica", replica_},
                         {"state", kStates[static_cast<size_t>(state())]},
                         {"payload_bytes", index_.payload_bytes()},
                         {"image_bytes", image_bytes_},
                         {"tensor_count", index_.tensors.size()},
                         {"ready_bytes", ready_bytes()},
                         {"total_bytes", total_bytes()},
                         {"copy_on_write", mapping_ != nullptr && mapping_->writable()}};
  info["artifact"] =
      state() == memory::FillState::ready ? nlohmann::json(artifact_id().to_text()) : nlohmann::json();
  for (const tensor::IndexFile& file : index_.files) info["files"].push_back(file.path);
  return info.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace tensord::client
