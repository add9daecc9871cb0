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

// Maps the segments one after another, private copy-on-write. Where strict overcommit refuses so much writable
// private memory, read-only.
Result<Mapping::Bytes> map_segments(std::span<base::Fd> segments, const flatbuffers::Vector<uint64_t>& sizes,
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
  if (total_bytes == 0) return Mapping::Bytes();
  // At a multiple of huge pages, so that those of the segments are mapped as such.
  TRY_ASSIGN(std::byte * address, memory::reserve_addresses(total_bytes, memory::kHugePageBytes));
  Mapping::Bytes mapped{address, total_bytes, true, std::make_shared<memory::Mapped>(address, total_bytes)};
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

// For reading alone, on the device.
Result<Mapping::Bytes> open_on_device(const OpenOptions& options, std::span<base::Fd> allocations,
                                      const flatbuffers::Vector<uint64_t>& sizes, uint64_t image_bytes) {
  gpu::Target memory{.size_bytes = image_bytes};
  uint64_t total_bytes = 0;
  for (size_t at = 0; at < allocations.size(); ++at) {
    total_bytes = base::checked_add(total_bytes, sizes[at]).value_or(UINT64_MAX);
    memory.allocations.emplace_back(std::move(allocations[at]), sizes[at]);
  }
  if (total_bytes < image_bytes) return fail(Code::corrupt, "the daemon sent too little memory of a GPU");
  if (options.hold_only) return Mapping::Bytes{.writable = false};
  TRY_ASSIGN(const gpu::Driver* driver, gpu::driver());
  TRY_ASSIGN(const int device, gpu::find_device(*driver, options.device));
  TRY_ASSIGN(const auto read, gpu::ReadMemory::open(*driver, device, memory));
  return Mapping::Bytes{reinterpret_cast<std::byte*>(read->address()), image_bytes, false, read};
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

Status check_dtypes(const tensor::Tensor& tensor, tensor::Dtype source, tensor::Dtype target, bool cast) {
  if (target == source) return {};
  const std::string_view source_text = source == tensor.dtype ? tensor.dtype_text : tensor::dtype_name(source);
  const std::string pair =
      base::text(base::quoted(tensor.name), " is ", source_text, ", its target ", tensor::dtype_name(target));
  if (!cast) return fail(Code::invalid_argument, pair + "; ask for a cast to convert");
  if (!tensor::can_cast(source, target)) return fail(Code::unsupported, pair + "; there is no such cast");
  return {};
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
  std::map<size_t, tensord_left_out> left_out;
  std::string why;        // of one that was left out; the daemon's reason, if there is one
  bool by_shape = false;  // that is the one's

  void leave_out(size_t order, tensord_left_out reason, const std::string& words) {
    const bool is_shape = reason == TENSORD_LEFT_OUT_BY_SHAPE;
    if (left_out.empty() || (by_shape && !is_shape)) {
      why = words;
      by_shape = is_shape;
    }
    left_out[order] = reason;
  }
};

Result<DeviceSplit> split_by_memory(const std::vector<CopyOrder>& orders, std::optional<gpu::Exports>& exports,
                                    bool from_device) {
  DeviceSplit split;
  for (size_t at = 0; at < orders.size(); ++at) {
    const CopyOrder& order = orders[at];
    const bool is_empty = order.begin == order.end;
    Result<std::optional<gpu::Exports::Place>> place;
    if (exports && !is_empty) place = exports->find(order.begin, order.end - order.begin);
    if (!place) {
      split.leave_out(at, TENSORD_LEFT_OUT_BY_MEMORY, place.error().message);
    } else if (!*place && order.on_device && !is_empty) {
      split.leave_out(at, TENSORD_LEFT_OUT_BY_MEMORY, "the GPU driver of this process does not know its target");
    } else if (!*place && from_device && !is_empty) {
      split.leave_out(at, TENSORD_LEFT_OUT_BY_MEMORY, "the model lies in GPU memory, its target does not");
    } else {
      (*place ? split.to_device : split.to_host).push_back(at);
    }
  }
  return split;
}

std::vector<CopyOrder> pick(const std::vector<CopyOrder>& orders, std::span<const size_t> positions) {
  std::vector<CopyOrder> picked;
  for (const size_t at : positions) picked.push_back(orders[at]);
  return picked;
}

bool is_fit(const tensor::CopyPlan& plan) {
  return std::all_of(plan.records.begin(), plan.records.end(), can_copy_to_device);
}

std::vector<std::string> names_of(std::span<const CopyOrder> orders) {
  std::set<std::string> names;
  for (const CopyOrder& order : orders) names.insert(order.tensor->name);
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
  auto answer = connection->ask(request_of(std::move(body)), std::move(fds), options.cancel);
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
  on_device_ = !options.device.empty() && !index_alone;
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
  const auto memory = std::span(answer.fds).subspan(kLeaseFillIndex);
  Mapping::Bytes mapped{.writable = !on_device_};
  if (!memory.empty()) {
    TRY_ASSIGN(mapped, on_device_ ? open_on_device(options, memory, *opened->segment_bytes(), windows_.image_bytes)
                                  : map_segments(memory, *opened->segment_bytes(), windows_.image_bytes));
  }
  mapping_ = std::make_shared<Mapping>(std::move(mapped), std::move(answer.fds[0]));
  map_begin_ns_ = begin_ns;
  map_ns_ = base::monotonic_ns() - begin_ns;
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
  protocol::WantT want;
  want.replica = replica_;
  want.first_block = first;
  want.last_block = last;
  connection_->tell(request_of(std::move(want)));
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

Result<tensor::IndexItems> to_items(const tensord_index_item* items, size_t count) {
  if (count > 0 && items == nullptr) return fail(Code::invalid_argument, "items is NULL");
  if (count > 4 * TENSORD_RANK_MAX) return fail(Code::invalid_argument, "too many index items");
  tensor::IndexItems out;
  for (const tensord_index_item& item : std::span(items, count)) {
    if (item.kind > TENSORD_NEW_AXIS) return fail(Code::invalid_argument, "index item of unknown kind ", item.kind);
    tensor::IndexItem one{.kind = static_cast<tensor::IndexItem::Kind>(item.kind)};
    if (item.kind == TENSORD_INTEGER) one.integer = item.start;
    if (item.kind == TENSORD_SLICE) {
      if (item.given & TENSORD_HAS_START) one.start = item.start;
      if (item.given & TENSORD_HAS_STOP) one.stop = item.stop;
      if (item.given & TENSORD_HAS_STEP) one.step = item.step;
    }
    out.push_back(one);
  }
  return out;
}

Result<CopyOrder> Model::order_of(const tensord_copy& copy, const tensord_copy_options& options) const {
  const auto refuse = [&](const char* why) { return fail(Code::invalid_argument, base::quoted(copy.name), ": ", why); };
  CopyOrder order{.on_device = copy.on_device != 0};
  TRY_ASSIGN(order.tensor, find(copy.name));
  tensor::Wanted& wanted = order.wanted;
  wanted.label = order.tensor->name;
  wanted.target_dtype = static_cast<tensor::Dtype>(copy.target_dtype);
  tensor::Strided& to = wanted.to;
  to.offset = reinterpret_cast<uint64_t>(copy.target);
  // Sub-byte and opaque targets are bytes, as resolve() makes their sources.
  to.element_bytes = tensor::dtype_bytes(wanted.target_dtype).value_or(1);
  to.shape.assign(copy.target_shape, copy.target_shape + copy.target_rank);
  const int64_t* const strides = copy.target_strides;
  to.strides = strides == nullptr ? tensor::row_major_strides(to.shape, to.element_bytes)
                                  : std::vector(strides, strides + copy.target_rank);
  if (to.element_count() > 0) {
    const auto [lowest, highest] = tensor::reach_of(to);
    if (copy.target == nullptr || lowest <= 0 || highest > UINT64_MAX) return refuse("the target is no memory");
    order.begin = static_cast<uint64_t>(lowest);
    order.end = static_cast<uint64_t>(highest);
  }
  TRY_ASSIGN(const tensor::IndexItems items, to_items(copy.items, copy.item_count));
  const bool has_region = copy.source_strides != nullptr;
  if (has_region && !items.empty()) return refuse("a region beside items");
  wanted.source_dtype = has_region ? static_cast<tensor::Dtype>(copy.source_dtype) : order.tensor->dtype;
  TRY(check_dtypes(*order.tensor, wanted.source_dtype, wanted.target_dtype, options.cast != 0));
  if (has_region) {
    tensor::Strided region{copy.source_offset, to.shape, {copy.source_strides, copy.source_strides + copy.target_rank}};
    TRY_ASSIGN(wanted.from, tensor::reinterpret(*order.tensor, wanted.source_dtype, std::move(region)));
  } else {
    TRY_ASSIGN(wanted.from, tensor::resolve(*order.tensor, items));
  }
  return order;
}

Result<Model::Prepared> Model::prepare(std::vector<CopyOrder> orders) const {
  // All targets are one memory, from the lowest address to the highest: overlaps between orders show as in one target.
  uint64_t begin = UINT64_MAX, end = 0;
  const auto mapped = mapping_ ? reinterpret_cast<uint64_t>(mapping_->data()) : 0;
  for (const CopyOrder& order : orders) {
    if (order.begin == order.end) continue;
    if (mapping_ && order.begin < mapped + mapping_->size_bytes() && mapped < order.end) {
      return fail(Code::invalid_argument, "load_into ", base::quoted(order.tensor->name),
                  ": the target is a tensor of the model itself");
    }
    begin = std::min(begin, order.begin);
    end = std::max(end, order.end);
  }
  std::vector<tensor::Wanted> wanted;
  wanted.reserve(orders.size());
  for (CopyOrder& order : orders) {
    tensor::Wanted& one = wanted.emplace_back(std::move(order.wanted));
    one.from.offset += windows_.image_offset(*order.tensor);
    one.to.offset = order.begin == order.end ? 0 : one.to.offset - begin;
  }
  Prepared prepared;
  TRY_ASSIGN(prepared.plan, tensor::compile(wanted));
  if (begin < end) prepared.target = {reinterpret_cast<std::byte*>(begin), end - begin};
  TRY(tensor::check_plan(prepared.plan, windows_.image_bytes, prepared.target.size(),
                         [&](size_t record) { return origin_of(prepared.plan.records[record], wanted); }));
  return prepared;
}

void LoadReport::add(const LoadReport& part) {
  record_count += part.record_count;
  plan_ns += part.plan_ns;
  copy_ns += part.copy_ns;
  copy.target_bytes += part.copy.target_bytes;
  copy.wait_ns += part.copy.wait_ns;
  copy.thread_count = std::max(copy.thread_count, part.copy.thread_count);
}

Result<LoadReport> Model::load_into(std::span<const tensord_copy> copies, const tensord_copy_options& options) {
  if (resident_ == Resident::artifact && mapping_ == nullptr)
    return fail(Code::invalid_argument, path_ + " was opened for its index only");
  const auto copy = [&]() -> Result<LoadReport> {
    std::vector<CopyOrder> orders;
    orders.reserve(copies.size());
    for (const tensord_copy& one : copies) {
      TRY_ASSIGN(orders.emplace_back(), order_of(one, options));
    }
    const gpu::Driver* driver = gpu::loaded_driver();
    const bool on_device = std::any_of(orders.begin(), orders.end(), [](const auto& order) { return order.on_device; });
    if (driver == nullptr && !on_device && !on_device_) return copy_to_host(std::move(orders), options);
    return copy_mixed(driver, std::move(orders), options);
  };
  auto done = copy();
  if (!done && !done.error().message.starts_with(path_)) done.error().message.insert(0, path_ + ": ");
  return done;
}

Result<LoadReport> Model::copy_to_host(std::vector<CopyOrder> orders, const tensord_copy_options& options) {
  return resident_ == Resident::view ? copy_streamed(orders, options) : copy_mapped(std::move(orders), options);
}

// Where some targets may be GPU memory. All orders are checked before the first byte is written.
Result<LoadReport> Model::copy_mixed(const gpu::Driver* driver, std::vector<CopyOrder> orders,
                                     const tensord_copy_options& options) {
  const int64_t begin_ns = base::monotonic_ns();
  std::optional<gpu::Exports> exports;
  if (driver != nullptr) exports.emplace(*driver);
  TRY_ASSIGN(DeviceSplit split, split_by_memory(orders, exports, on_device_));
  if (split.to_device.empty() && split.left_out.empty()) return copy_to_host(std::move(orders), options);
  if (resident_ == Resident::view) {
    for (const size_t at : std::exchange(split.to_device, {}))
      split.leave_out(at, TENSORD_LEFT_OUT_BY_MEMORY, "the model is read in batches");
  }
  TRY_ASSIGN(Prepared prepared, prepare(orders));
  if (!is_fit(prepared.plan)) {
    for (const size_t at : std::exchange(split.to_device, {})) {
      TRY_ASSIGN(const tensor::CopyPlan one, tensor::compile(std::span(&orders[at].wanted, 1)));
      if (is_fit(one)) split.to_device.push_back(at);
      if (!is_fit(one)) split.leave_out(at, TENSORD_LEFT_OUT_BY_SHAPE, "a cast, or elements that are not side by side");
    }
  }
  if (split.to_device.size() < orders.size()) {
    TRY_ASSIGN(prepared, prepare(pick(orders, split.to_device)));
  }
  if (!split.left_out.empty() && options.left_out == nullptr)
    return fail(Code::unsupported, "load_into ", base::quoted(orders[split.left_out.begin()->first].tensor->name), ": ",
                split.why);
  LoadReport report{.begin_ns = begin_ns, .plan_ns = base::monotonic_ns() - begin_ns};
  LoadReport host;  // reported by itself
  if (!split.to_host.empty()) {
    TRY_ASSIGN(host, copy_to_host(pick(orders, split.to_host), options));
  }
  const auto target = reinterpret_cast<gpu::Address>(prepared.target.data());
  Result<protocol::CopiedToDeviceT> copied;
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
    const auto place = exports->find(orders[at].begin, orders[at].end - orders[at].begin);
    const auto why = place && *place ? refused.find((*place)->device) : refused.end();
    if (why != refused.end()) split.leave_out(at, TENSORD_LEFT_OUT_BY_MEMORY, why->second.message);
  }
  report.record_count = prepared.plan.records.size();
  report.device = *copied;
  report.copy.target_bytes = copied->bytes;
  report.copy.wait_ns = copied->wait_ns;
  report.copy_ns = copied->copy_ns;
  report.left_out_why = std::move(split.why);
  report_use(report);
  for (const auto& [order, reason] : split.left_out) options.left_out[order] = static_cast<uint8_t>(reason);
  report.add(host);
  return report;
}

Result<LoadReport> Model::copy_mapped(std::vector<CopyOrder> orders, const tensord_copy_options& options) {
  const int64_t begin_ns = base::monotonic_ns();
  TRY_ASSIGN(const Prepared prepared, prepare(std::move(orders)));
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
Result<Model::Parts> Model::cut(const std::vector<CopyOrder>& orders) const {
  const std::vector<uint32_t> numbers = tensor::batch_numbers(index_, batch_bytes_);
  Parts parts;
  for (const CopyOrder& order : orders) {
    if (order.begin == order.end) continue;
    const uint64_t memory_bytes = memory::memory_bytes(order.tensor->size_bytes + tensor::kImageAlignment);
    if (memory_bytes > memory_bytes_max_) {
      return fail(Code::exhausted, "load_into ", base::quoted(order.tensor->name), ": it needs ",
                  base::human_bytes(memory_bytes), ", host_memory is ", base::human_bytes(memory_bytes_max_),
                  "; raise host_memory");
    }
    parts[numbers[static_cast<size_t>(order.tensor - index_.tensors.data())]].push_back(order);
  }
  return parts;
}

Result<LoadReport> Model::copy_streamed(const std::vector<CopyOrder>& orders,
                                        const tensord_copy_options& options) const {
  const int64_t begin_ns = base::monotonic_ns();
  TRY(prepare(orders));
  TRY_ASSIGN(Parts parts, cut(orders));
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
    for (CopyOrder& order : part->second) {
      const auto there = batch->find(order.tensor->name);
      if (!there) return stopped(there.error());
      order.tensor = *there;
    }
    const auto copied = batch->copy_mapped(std::move(part->second), options);
    if (!copied) return stopped(copied.error());
    sum.add(*copied);
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
  connection_->tell(request_of(std::move(used)));
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
