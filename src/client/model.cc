#include "client/model.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <set>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "memory/fresh_pages.h"
#include "rpc/index_rows.h"
#include "rpc/messages.h"
#include "tensor/plan.h"
#include "tensor/selection.h"

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
      return fail(Code::corrupt, "the daemon sent a segment that is not sealed, or of another size than it tells");
    }
    total_bytes = *sum;
  }
  if (total_bytes < image_bytes) return fail(Code::corrupt, "the daemon sent too few segments");
  if (total_bytes == 0) return MappedSegments();
  // At a multiple of huge pages, so that those of the segments are mapped as such.
  TRY_ASSIGN(std::byte * address, memory::reserve_addresses(total_bytes, memory::kHugePageBytes));
  MappedSegments mapped{memory::Mapped(address, total_bytes)};
  for (size_t at = 0; at < segments.size(); ++at) {
    constexpr int kFlags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    const int fd = segments[at].get();
    if (::mmap(address, sizes[at], PROT_READ | PROT_WRITE, kFlags, fd, 0) == MAP_FAILED) {
      mapped.writable = false;
      if (::mmap(address, sizes[at], PROT_READ, kFlags, fd, 0) == MAP_FAILED)
        return base::fail_errno(errno, "map a segment");
    }
    address += sizes[at];
  }
  return mapped;
}

// The daemon names files as their first client did; here they are named as this one does, and held against its index.json.
Status adopt_names(const Checkpoint& checkpoint, tensor::Holds holds, tensor::Index& index) {
  if (index.files.size() != checkpoint.files.size()) {
    return fail(Code::corrupt, "the daemon's index has another number of files than were opened");
  }
  for (size_t at = 0; at < index.files.size(); ++at) index.files[at].path = checkpoint.files[at];
  if (!checkpoint.shards) return {};
  const Status fits = tensor::check_shard_index(*checkpoint.shards, index, holds);
  if (!fits) return fail(fits.error().code, checkpoint.path + ": " + fits.error().message);
  return {};
}

// [begin, end) of what a target can touch.
struct AddressRange {
  uint64_t begin = UINT64_MAX;
  uint64_t end = 0;
  bool empty() const { return begin >= end; }
};

Result<AddressRange> addresses_of(const CopyOrder& order) {
  if (order.to.shape.size() != order.to.strides.size()) {
    return fail(Code::invalid_argument, base::quoted(order.name), ": target with ", order.to.shape.size(),
                " dimensions and ", order.to.strides.size(), " strides");
  }
  if (order.to.element_count() == 0) return AddressRange{};
  tensor::Strided at = order.to;
  at.offset = reinterpret_cast<uint64_t>(order.target);
  const auto [lowest, highest] = tensor::reach_of(at);
  if (order.target == nullptr || lowest <= 0 || highest > UINT64_MAX) {
    return fail(Code::invalid_argument, base::quoted(order.name), ": the target is no memory");
  }
  return AddressRange{static_cast<uint64_t>(lowest), static_cast<uint64_t>(highest)};
}

Status check_dtypes(const tensor::Tensor& tensor, tensor::Dtype source, tensor::Dtype target, bool cast) {
  if (target == source) return {};
  const std::string_view source_text = source == tensor.dtype ? tensor.dtype_text : tensor::dtype_name(source);
  const std::string pair =
      base::text(base::quoted(tensor.name), " is ", source_text, ", its target ", tensor::dtype_name(target));
  if (!cast) return fail(Code::invalid_argument, pair + "; ask for a cast to convert");
  if (!tensor::can_cast(source, target)) return fail(Code::unsupported, pair + "; there is no such cast");
  return {};
}

// The region of the image that an order reads.
Result<tensor::Strided> source_of(const CopyOrder& order, const tensor::Tensor& tensor, uint64_t image_offset) {
  if (!order.region) return tensor::resolve(tensor, order.items, image_offset);
  if (!order.items.empty()) return fail(Code::invalid_argument, base::quoted(order.name), ": a region beside items");
  const SourceRegion& region = *order.region;
  return tensor::reinterpret(tensor, region.dtype, {region.offset, order.to.shape, region.strides}, image_offset);
}

// The tensor that a record came from, for an error.
std::string origin_of(const tensor::Copy2D& record, std::span<const tensor::Wanted> wanted) {
  for (size_t at = 0; at < wanted.size(); ++at) {
    const auto plan = tensor::compile(wanted.subspan(at, 1));
    if (plan && std::count(plan->records.begin(), plan->records.end(), record) > 0)
      return base::text("(", base::quoted(wanted[at].label), ") ");
  }
  return {};
}

// Which orders (by position) go where.
struct DeviceSplit {
  std::vector<size_t> to_host, to_device;
  std::vector<LeftOut> left_out;
  std::string why;  // of one that was left out; the daemon's reason, if there is one

  void leave_out(LeftOut order, const std::string& reason) {
    if (why.empty() || (left_out.back().by_shape && !order.by_shape)) why = reason;
    left_out.push_back(order);
  }
  std::vector<CopyOrder> orders(std::span<const CopyOrder> all) const {
    std::vector<CopyOrder> some;
    for (const size_t at : to_device) some.push_back(all[at]);
    return some;
  }
};

Result<DeviceSplit> split_by_memory(std::span<const CopyOrder> orders, std::optional<gpu::Exports>& exports,
                                    bool from_device) {
  DeviceSplit split;
  for (size_t at = 0; at < orders.size(); ++at) {
    TRY_ASSIGN(const AddressRange range, addresses_of(orders[at]));
    Result<std::optional<gpu::Exports::Place>> place;
    if (exports && !range.empty()) place = exports->find(range.begin, range.end - range.begin);
    if (!place) {
      split.leave_out({at}, place.error().message);
    } else if (!*place && orders[at].on_device && !range.empty()) {
      split.leave_out({at}, "the GPU driver of this process does not know its target");
    } else if (!*place && from_device && !range.empty()) {
      split.leave_out({at}, "the model lies in GPU memory, its target does not");
    } else {
      (*place ? split.to_device : split.to_host).push_back(at);
    }
  }
  return split;
}

bool is_fit(const tensor::CopyPlan& plan) {
  return std::all_of(plan.records.begin(), plan.records.end(), can_copy_to_device);
}

std::vector<std::string> names_of(std::span<const CopyOrder> orders) {
  std::set<std::string> names;
  for (const CopyOrder& order : orders) names.emplace(order.name);
  return {names.begin(), names.end()};
}

}  // namespace

Status Mapping::check_daemon() const {
  pollfd lease{lease_.get(), 0, 0};
  if (::poll(&lease, 1, 0) == 0) return {};  // an error event: the daemon's read end is closed
  return fail(Code::unavailable, "the daemon went away while it was reading; open the model again");
}

Result<std::shared_ptr<Model>> Model::open(const std::vector<std::string>& paths, const OpenOptions& options) {
  TRY_ASSIGN(Checkpoint checkpoint, find_checkpoint(paths));
  TRY_ASSIGN(std::shared_ptr<Connection> connection, Connection::open(options.autostart));
  TRY_ASSIGN(const std::shared_ptr<Model> model,
             ask(std::move(connection), checkpoint, options, protocol::Stay::artifact));
  const bool streams = options.resident == Resident::view || (model->mapping_ == nullptr && !options.index_only);
  if (streams) model->resident_ = Resident::view;
  if (streams) model->checkpoint_ = std::move(checkpoint);
  return model;
}

Result<std::shared_ptr<Model>> Model::ask(std::shared_ptr<Connection> connection, const Checkpoint& checkpoint,
                                          const OpenOptions& options, protocol::Stay stay) {
  const auto too_long = [](const std::string& words) { return words.size() > rpc::kTextBytesMax; };
  if (options.only.size() > tensor::kOnlyCountMax || std::any_of(options.only.begin(), options.only.end(), too_long)) {
    return fail(Code::invalid_argument, "open ", checkpoint.path, ": only: at most ", tensor::kOnlyCountMax,
                " names of at most ", rpc::kTextBytesMax, " bytes are possible");
  }
  protocol::OpenT body;
  body.path = checkpoint.path;
  body.paths = checkpoint.files;
  body.index_only = options.index_only || options.resident == Resident::view;
  body.only = options.only;
  body.stay = stay;
  body.memory_wait_ms = options.memory_wait_ms;
  if (!options.device.empty()) {
    TRY_ASSIGN(body.device, gpu::device_uuid(options.device));
  }
  std::vector<base::Fd> fds;
  for (const base::Fd& fd : checkpoint.fds) {
    TRY_ASSIGN(fds.emplace_back(), base::duplicate(fd.get()));
  }
  protocol::RequestUnion request;
  request.Set(std::move(body));
  auto answer = connection->ask(std::move(request), std::move(fds), options.cancel);
  if (!answer && answer.error().message.starts_with("only: "))
    answer.error().message.insert(0, "open " + checkpoint.path + ": ");
  if (!answer) return base::pass_on(answer);
  std::shared_ptr<Model> model(new Model);
  model->connection_ = std::move(connection);
  model->device_connections_ = std::make_unique<DeviceConnections>(options.autostart);
  TRY(model->adopt(checkpoint, options, std::move(*answer)));
  return model;
}

// Maps what was granted.
Status Model::adopt(const Checkpoint& checkpoint, const OpenOptions& options, Answer answer) {
  const int64_t begin_ns = base::monotonic_ns();
  const auto* opened = answer.frame().reply_as_Opened();
  const size_t segment_count =
      opened == nullptr || opened->segment_bytes() == nullptr ? 0 : opened->segment_bytes()->size();
  constexpr size_t kLeaseFillIndex = 3;
  const bool index_alone = answer.fds.size() == 1;
  if (opened == nullptr || (!index_alone && answer.fds.size() != kLeaseFillIndex + segment_count)) {
    return fail(Code::corrupt, "the daemon answered something else than an opened artifact");
  }
  path_ = checkpoint.path;
  only_ = options.only;
  replica_ = opened->replica();
  batch_bytes_ = opened->batch_bytes();
  memory_bytes_max_ = opened->memory_bytes_max();
  const base::Fd& index_fd = answer.fds[index_alone ? 0 : kLeaseFillIndex - 1];
  TRY_ASSIGN(index_, rpc::decode_index(index_fd, opened->index_bytes()));
  TRY(adopt_names(checkpoint, only_.empty() ? tensor::Holds::all : tensor::Holds::some, index_));
  on_device_ = !options.device.empty();
  windows_ = on_device_ ? tensor::device_windows_of(index_) : tensor::windows_of(index_);
  if (windows_.image_bytes != opened->image_bytes()) {
    return fail(Code::corrupt, "the daemon's image is of another size than the tensors in it");
  }
  if (!only_.empty()) {
    TRY_ASSIGN(const std::vector<uint32_t> positions, tensor::select(index_, only_));
    if (positions.size() < index_.tensors.size()) {
      granted_ = std::move(index_);
      index_ = tensor::take(*granted_, positions);
    }
  }
  if (index_alone) return {};
  TRY_ASSIGN(fill_, memory::FillView::open(answer.fds[1]));
  MappedSegments mapped;
  if (on_device_) {
    TRY(map_on_device(options, answer));
  } else if (segment_count > 0) {
    TRY_ASSIGN(mapped, map_segments(std::span(answer.fds).subspan(kLeaseFillIndex), *opened->segment_bytes(),
                                    windows_.image_bytes));
  }
  if (!on_device_)
    mapping_ = std::make_shared<Mapping>(std::move(mapped.memory), mapped.writable, std::move(answer.fds[0]));
  map_begin_ns_ = begin_ns;
  map_ns_ = base::monotonic_ns() - begin_ns;
  return {};
}

Status Model::map_on_device(const OpenOptions& options, Answer& answer) {
  const auto* sizes = answer.frame().reply_as_Opened()->segment_bytes();
  const uint32_t count = sizes == nullptr ? 0 : sizes->size();
  gpu::Target memory{.size_bytes = windows_.image_bytes};
  uint64_t total_bytes = 0;
  for (uint32_t at = 0; at < count; ++at) {
    total_bytes = base::checked_add(total_bytes, sizes->Get(at)).value_or(UINT64_MAX);
    memory.allocations.emplace_back(std::move(answer.fds[answer.fds.size() - count + at]), sizes->Get(at));
  }
  if (total_bytes < windows_.image_bytes) return fail(Code::corrupt, "the daemon sent too little memory of a GPU");
  std::shared_ptr<gpu::ReadMemory> read;
  if (!options.hold_only) {
    TRY_ASSIGN(const gpu::Driver* driver, gpu::driver());
    TRY_ASSIGN(const int device, gpu::find_device(*driver, options.device));
    TRY_ASSIGN(read, gpu::ReadMemory::open(*driver, device, memory));
  }
  mapping_ = std::make_shared<Mapping>(std::move(read), windows_.image_bytes, std::move(answer.fds[0]));
  return {};
}

Result<std::shared_ptr<Model>> Model::open_part(std::vector<std::string> names) const {
  return open_part(connection_, std::move(names), protocol::Stay::lease);
}

Result<std::shared_ptr<Model>> Model::open_part(std::shared_ptr<Connection> connection, std::vector<std::string> names,
                                                protocol::Stay stay, const int32_t* cancel) const {
  if (resident_ != Resident::view) return fail(Code::invalid_argument, path_ + " was not opened to be streamed");
  TRY_ASSIGN(std::shared_ptr<Model> part,
             ask(std::move(connection), checkpoint_, {.only = std::move(names), .cancel = cancel}, stay));
  // After the daemon has looked: what is as it was now was so then.
  for (size_t at = 0; at < checkpoint_.fds.size(); ++at) {
    TRY(base::check_unchanged(checkpoint_.fds[at].get(), checkpoint_.identities[at], checkpoint_.files[at]));
  }
  if (part->mapping_ == nullptr) return fail(Code::corrupt, "the daemon granted no memory");
  return part;
}

const std::byte* Model::data(const tensor::Tensor& tensor) const {
  if (mapping_ == nullptr || mapping_->data() == nullptr) return nullptr;
  return mapping_->data() + windows_.image_offset(tensor);
}

memory::FillState Model::state() const {
  if (fill_) return fill_->state();
  return resident_ == Resident::view ? memory::FillState::ready : memory::FillState::filling;
}
uint64_t Model::ready_bytes() const { return fill_ ? fill_->ready_bytes() : 0; }
uint64_t Model::total_bytes() const {
  if (fill_) return fill_->total_bytes();
  return resident_ == Resident::view ? 0 : windows_.image_bytes;
}
tensor::Digest Model::artifact_id() const { return fill_ && !granted_ ? fill_->artifact_id() : tensor::Digest{}; }

const tensor::ImageLayout& Model::layout() const {
  base::MutexLock lock(mutex_);
  if (!layout_) layout_ = tensor::lay_out(granted_ ? *granted_ : index_);
  return *layout_;
}

Status Model::wait_for(uint64_t image_offset, uint64_t size_bytes, int64_t timeout_ms, const int32_t* cancel) const {
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
  const auto go_on = [&]() -> Status {
    TRY(memory::check_cancel(cancel));
    return mapping_->check_daemon();
  };
  const bool patient = timeout_ms < 0 || timeout_ms > kPatienceMs;
  Status there = fill_->wait(first, last, patient ? kPatienceMs : timeout_ms, go_on);
  if (there || fill_->state() != memory::FillState::filling || !go_on() || !patient) return there;
  protocol::RequestUnion request;
  protocol::WantT want;
  want.replica = replica_;
  want.first_block = first;
  want.last_block = last;
  request.Set(std::move(want));
  connection_->tell(std::move(request));
  return fill_->wait(first, last, timeout_ms < 0 ? timeout_ms : timeout_ms - kPatienceMs, go_on);
}

Status Model::wait(const tensor::Tensor* tensor, int64_t timeout_ms) const {
  if (resident_ == Resident::view) return {};
  if (tensor != nullptr) {
    // Blocks are those of the image in host memory.
    const bool elsewhere = on_device_ && fill_->state() != memory::FillState::ready;
    const uint64_t offset = (elsewhere ? layout().windows : windows_).image_offset(*tensor);
    return wait_for(offset, tensor->size_bytes, timeout_ms);
  }
  if (!fill_) return fail(Code::invalid_argument, path_ + " was opened for its index only");
  if (!granted_) return fill_->wait_ready(timeout_ms, [this] { return mapping_->check_daemon(); });
  const int64_t begin_ns = base::monotonic_ns();
  for (const tensor::Tensor& one : index_.tensors) {
    const int64_t waited_ms = (base::monotonic_ns() - begin_ns) / 1'000'000;
    TRY(wait(&one, timeout_ms < 0 ? timeout_ms : std::max<int64_t>(timeout_ms - waited_ms, 0)));
  }
  return {};
}

Result<const tensor::Tensor*> Model::find(std::string_view name) const {
  const tensor::Tensor* tensor = index_.find(name);
  if (tensor == nullptr) {
    return fail(Code::not_found, path_, " has no tensor ", base::quoted(name), tensor::suggestion(index_, name));
  }
  return tensor;
}

Result<Model::Prepared> Model::prepare(std::span<const CopyOrder> orders, const CopyOrderOptions& options) const {
  // All targets are one memory, from the lowest address to the highest: overlaps between orders show as in one target.
  AddressRange all;
  for (const CopyOrder& order : orders) {
    TRY_ASSIGN(const AddressRange range, addresses_of(order));
    if (range.empty()) continue;
    const auto mapped = mapping_ ? reinterpret_cast<uint64_t>(mapping_->data()) : 0;
    if (mapping_ && range.begin < mapped + mapping_->size_bytes() && mapped < range.end) {
      return fail(Code::invalid_argument, "load_into ", base::quoted(order.name),
                  ": the target is a tensor of the model itself");
    }
    all.begin = std::min(all.begin, range.begin);
    all.end = std::max(all.end, range.end);
  }
  std::vector<tensor::Wanted> wanted;
  for (const CopyOrder& order : orders) {
    TRY_ASSIGN(const tensor::Tensor* tensor, find(order.name));
    const tensor::Dtype source_dtype = order.region ? order.region->dtype : tensor->dtype;
    TRY(check_dtypes(*tensor, source_dtype, order.target_dtype, options.cast));
    TRY_ASSIGN(tensor::Strided from, source_of(order, *tensor, windows_.image_offset(*tensor)));
    wanted.push_back({.label = order.name,
                      .from = std::move(from),
                      .to = order.to,
                      .source_dtype = source_dtype,
                      .target_dtype = order.target_dtype});
    tensor::Strided& to = wanted.back().to;
    to.offset = to.element_count() == 0 ? 0 : reinterpret_cast<uint64_t>(order.target) - all.begin;
  }
  Prepared prepared;
  TRY_ASSIGN(prepared.plan, tensor::compile(wanted));
  if (!all.empty()) prepared.target = {reinterpret_cast<std::byte*>(all.begin), all.end - all.begin};
  TRY(tensor::check_plan(prepared.plan, windows_.image_bytes, prepared.target.size(),
                         [&](size_t record) { return origin_of(prepared.plan.records[record], wanted); }));
  return prepared;
}

Result<LoadReport> Model::load_into(std::span<const CopyOrder> orders, const CopyOrderOptions& options) {
  if (resident_ == Resident::artifact && mapping_ == nullptr)
    return fail(Code::invalid_argument, path_ + " was opened for its index only");
  const gpu::Driver* driver = gpu::loaded_driver();
  const bool on_device = std::any_of(orders.begin(), orders.end(), [](const auto& order) { return order.on_device; });
  const bool mixed = driver != nullptr || on_device || on_device_;
  auto done = mixed ? copy_mixed(driver, orders, options) : copy_to_host(orders, options);
  if (!done && !done.error().message.starts_with(path_)) done.error().message.insert(0, path_ + ": ");
  return done;
}

Result<LoadReport> Model::copy_to_host(std::span<const CopyOrder> orders, const CopyOrderOptions& options) {
  return resident_ == Resident::view ? copy_streamed(orders, options) : copy_mapped(orders, options);
}

// Where some targets may be GPU memory. All orders are checked before the first byte is written.
Result<LoadReport> Model::copy_mixed(const gpu::Driver* driver, std::span<const CopyOrder> orders,
                                     const CopyOrderOptions& options) {
  const int64_t begin_ns = base::monotonic_ns();
  std::optional<gpu::Exports> exports;
  if (driver != nullptr) exports.emplace(*driver);
  TRY_ASSIGN(DeviceSplit split, split_by_memory(orders, exports, on_device_));
  if (split.to_device.empty() && split.left_out.empty()) return copy_to_host(orders, options);
  if (resident_ == Resident::view) {
    for (const size_t at : std::exchange(split.to_device, {})) split.leave_out({at}, "the model is read in batches");
  }
  TRY_ASSIGN(Prepared prepared, prepare(orders, options));
  if (split.to_device.size() < orders.size()) {
    TRY_ASSIGN(prepared, prepare(split.orders(orders), options));
  }
  if (!is_fit(prepared.plan)) {
    for (const size_t at : std::exchange(split.to_device, {})) {
      TRY_ASSIGN(const Prepared one, prepare(orders.subspan(at, 1), options));
      if (is_fit(one.plan)) split.to_device.push_back(at);
      if (!is_fit(one.plan)) split.leave_out({at, true}, "a cast, or elements that are not side by side");
    }
    TRY_ASSIGN(prepared, prepare(split.orders(orders), options));
  }
  if (!split.left_out.empty() && options.left_out == nullptr)
    return fail(Code::unsupported, "load_into ", base::quoted(orders[split.left_out.front().order].name), ": ",
                split.why);
  LoadReport report{.begin_ns = begin_ns, .plan_ns = base::monotonic_ns() - begin_ns};
  LoadReport host;  // reported by itself
  if (!split.to_host.empty()) {
    std::vector<CopyOrder> to_host;
    for (const size_t at : split.to_host) to_host.push_back(orders[at]);
    TRY_ASSIGN(host, copy_to_host(to_host, options));
  }
  const auto target = reinterpret_cast<gpu::Address>(prepared.target.data());
  Result<DeviceCopied> copied;
  std::map<int, base::Error> refused;
  if (!split.to_device.empty()) {
    const Status daemon = mapping_->check_daemon();  // another one's replicas have other numbers
    copied = daemon ? copy_to_devices(prepared.plan, target, *exports, replica_, *device_connections_, options.cancel,
                                      options.left_out == nullptr ? nullptr : &refused)
                    : base::pass_on(daemon);
  }
  if (!copied && host.copy.target_bytes > 0) copied.error().target = base::TargetState::dirty;
  if (!copied) return base::pass_on(copied);
  for (const size_t at : std::exchange(split.to_device, {})) {
    TRY_ASSIGN(const AddressRange range, addresses_of(orders[at]));
    const auto place = exports->find(range.begin, range.end - range.begin);
    const auto why = place && *place ? refused.find((*place)->device) : refused.end();
    if (why != refused.end()) split.leave_out({at}, why->second.message);
  }
  report.record_count = prepared.plan.records.size();
  report.device = *copied;
  report.copy.target_bytes = copied->bytes;
  report.copy.wait_ns = copied->wait_ns;
  report.copy_ns = copied->copy_ns;
  report.left_out_why = std::move(split.why);
  report_use(report);
  if (!split.left_out.empty()) *options.left_out = std::move(split.left_out);
  report.record_count += host.record_count;
  report.plan_ns += host.plan_ns;
  report.copy_ns += host.copy_ns;
  report.copy.target_bytes += host.copy.target_bytes;
  report.copy.wait_ns += host.copy.wait_ns;
  report.copy.thread_count = host.copy.thread_count;
  return report;
}

Result<LoadReport> Model::copy_mapped(std::span<const CopyOrder> orders, const CopyOrderOptions& options) {
  const int64_t begin_ns = base::monotonic_ns();
  TRY_ASSIGN(const Prepared prepared, prepare(orders, options));
  LoadReport report{.begin_ns = begin_ns};
  report.record_count = prepared.plan.records.size();
  report.plan_ns = base::monotonic_ns() - begin_ns;
  memory::CopyOptions run{
      .thread_count = options.thread_count, .cancel = options.cancel, .keep_spans = connection_->keep_spans()};
  if (fill_->state() != memory::FillState::ready) {
    run.ready = [this, &options](uint64_t offset, uint64_t size_bytes) {
      return wait_for(offset, size_bytes, -1, options.cancel);
    };
  }
  TRY_ASSIGN(report.copy,
             memory::execute(prepared.plan, {mapping_->data(), mapping_->size_bytes()}, prepared.target, run));
  report.copy_ns = base::monotonic_ns() - begin_ns - report.plan_ns;
  report_use(report);
  return report;
}

// Which orders go with which batch. A tensor that no batch can hold is refused here, before a byte is written.
Result<Model::Parts> Model::cut(std::span<const CopyOrder> orders) const {
  const std::vector<uint32_t> numbers = tensor::batch_numbers(index_, batch_bytes_);
  Parts parts;
  for (const CopyOrder& order : orders) {
    TRY_ASSIGN(const tensor::Tensor* tensor, find(order.name));
    if (order.to.element_count() == 0) continue;
    const uint64_t memory_bytes = memory::memory_bytes(tensor->size_bytes + tensor::kImageAlignment);
    if (memory_bytes > memory_bytes_max_) {
      return fail(Code::exhausted, "load_into ", base::quoted(order.name), ": it needs ",
                  base::human_bytes(memory_bytes), ", host_memory is ", base::human_bytes(memory_bytes_max_),
                  "; raise host_memory");
    }
    parts[numbers[static_cast<size_t>(tensor - index_.tensors.data())]].push_back(order);
  }
  return parts;
}

Result<LoadReport> Model::copy_streamed(std::span<const CopyOrder> orders, const CopyOrderOptions& options) const {
  const int64_t begin_ns = base::monotonic_ns();
  TRY(prepare(orders, options));
  TRY_ASSIGN(const Parts parts, cut(orders));
  // One of its own: to open a batch may take until another thread of this process is done with its own.
  TRY_ASSIGN(const std::shared_ptr<Connection> connection, Connection::open(connection_->autostart()));
  LoadReport sum;
  sum.plan_ns = base::monotonic_ns() - begin_ns;
  std::shared_ptr<Model> ahead;
  for (auto part = parts.begin(); part != parts.end(); ++part) {
    const auto stopped = [&](base::Error error) {
      if (sum.copy.target_bytes > 0) error.target = base::TargetState::dirty;
      return tl::unexpected(std::move(error));
    };
    std::shared_ptr<Model> batch = std::move(ahead);
    if (batch == nullptr) {
      auto opened = open_part(connection, names_of(part->second), protocol::Stay::batch, options.cancel);
      if (!opened) return stopped(opened.error());
      batch = std::move(*opened);
    }
    if (const auto next = std::next(part); next != parts.end()) {
      auto opened = open_part(connection, names_of(next->second), protocol::Stay::batch_ahead, options.cancel);
      if (!opened && opened.error().code != Code::exhausted) return stopped(opened.error());
      if (opened) ahead = std::move(*opened);
    }
    const auto copied = batch->copy_mapped(part->second, options);
    if (!copied) return stopped(copied.error());
    sum.copy.target_bytes += copied->copy.target_bytes;
    sum.copy.wait_ns += copied->copy.wait_ns;
    sum.copy.thread_count = std::max(sum.copy.thread_count, copied->copy.thread_count);
    sum.record_count += copied->record_count;
    sum.plan_ns += copied->plan_ns;
  }
  sum.copy_ns = base::monotonic_ns() - begin_ns - sum.plan_ns;
  return sum;
}

void Model::report_use(const LoadReport& report) {
  if (mapping_ == nullptr || !mapping_->check_daemon()) return;  // a process with its pid may be there again
  protocol::UsedT used;
  used.replica = replica_;
  used.begin_ns = report.begin_ns;
  used.map_begin_ns = map_begin_ns_;
  used.map_ns = map_ns_;
  used.plan_ns = report.plan_ns;
  used.wait_ns = report.copy.wait_ns;
  used.copy_ns = report.copy_ns;
  used.copy_bytes = report.copy.target_bytes;
  used.device_bytes = report.device.bytes;
  used.slower_why = report.left_out_why.substr(0, rpc::kTextBytesMax);
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
                         {"image_bytes", windows_.image_bytes},
                         {"on_device", on_device_},
                         {"resident", resident_ == Resident::view ? "view" : "artifact"},
                         {"tensor_count", index_.tensors.size()},
                         {"ready_bytes", ready_bytes()},
                         {"total_bytes", total_bytes()},
                         {"copy_on_write", mapping_ != nullptr && mapping_->writable()}};
  const tensor::Digest artifact = artifact_id();
  info["artifact"] = artifact == tensor::Digest() ? nlohmann::json() : nlohmann::json(artifact.to_text());
  info["only"] = only_.empty() ? nlohmann::json() : nlohmann::json(only_);
  for (const tensor::IndexFile& file : index_.files) info["files"].push_back(file.path);
  return info.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace tensord::client
