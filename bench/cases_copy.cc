// strided, tp, faults, plan_compile: slices into the caller's memory.
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/text.h"
#include "bench/allocations.h"
#include "bench/checkpoint.h"
#include "bench/gather.h"
#include "bench/processes.h"
#include "tensor/plan.h"

namespace tensord::bench {

using base::kKiB;
using base::kMiB;

namespace {

constexpr uint64_t kElementBytes = 2;

// ---- strided -----------------------------------------------------------------------------------------------

constexpr uint64_t kQwenRowBytes = 5120 * kElementBytes;  // of Qwen3-14B's o_proj

struct StridedShape {
  uint64_t row_bytes, pitch_factor;
};

// Slices of one width out of the sheet at `path`. For Qwen3-14B's rows, also how the narrower ones fare.
Status race_sheet(Bench& bench, const std::string& path, std::span<const StridedShape> shapes) {
  TRY_ASSIGN(const auto model, open_ready(path));
  TRY_ASSIGN(const tensor::Tensor* matrix, model->find("w"));
  std::vector<Gather> gathers;
  for (const StridedShape& shape : shapes) {
    const uint64_t columns = shape.row_bytes / kElementBytes;
    TRY_ASSIGN(Gather gather, Gather::make(model, {{"w", 0, matrix->shape[0], columns, columns}}));
    const std::string name = base::text("rows of ", shape.row_bytes, " B, pitch ", shape.pitch_factor, " x");
    TRY_ASSIGN(Figure figure, race_gather(bench, gather, name, path));
    figure.details["row_bytes"] = static_cast<double>(shape.row_bytes);
    figure.details["pitch_factor"] = static_cast<double>(shape.pitch_factor);
    bench.add(std::move(figure));
    if (shape.row_bytes * shape.pitch_factor == kQwenRowBytes) gathers.push_back(std::move(gather));
  }
  if (gathers.empty()) return {};
  const double goals[] = {0.8, 0.7};
  for (size_t narrow = 1; narrow < gathers.size(); ++narrow) {
    const auto rate_of = [](Gather& gather) -> Result<Sample> {
      TRY_ASSIGN(const Sample sample, gather.run_product());
      return sample.seconds / static_cast<double>(gather.bytes());
    };
    const Contender wide[] = {{"rows of 5120 B", [&] { return rate_of(gathers[0]); }}};
    TRY_ASSIGN(const Race raced, race(bench.options(), wide, [&] { return rate_of(gathers[narrow]); }));
    bench.add({.name = base::text("product, rows of ", shapes[narrow].row_bytes, " B"),
               .unit = "of its rate at 5120 B",
               .value = median(raced.ratios),
               .spread = spread(raced.ratios),
               .goal = at_least(goals[narrow - 1]),
               .samples = raced.ratios});
  }
  return {};
}

// ---- plan_compile ------------------------------------------------------------------------------------------

// Tensors one after another in one image, as in one file.
tensor::Index index_of(std::span<const TensorShape> shapes) {
  tensor::Index index;
  index.files.push_back({.path = "model.safetensors"});
  uint64_t offset = 4096;
  for (const TensorShape& shape : shapes) {
    index.tensors.push_back({.name = shape.name,
                             .dtype = tensor::Dtype::bf16,
                             .dtype_text = "BF16",
                             .shape = shape.shape,
                             .offset = offset,
                             .size_bytes = shape.size_bytes()});
    offset += shape.size_bytes();
  }
  index.files[0].size_bytes = offset;
  return index;
}

struct Request {
  const tensor::Tensor* tensor = nullptr;
  tensor::IndexItems items;
  tensor::Strided to;
};

// Slices of `index`, packed into one target.
std::vector<Request> requests_of(const tensor::Index& index, std::span<const Slice> slices, uint64_t& target_bytes) {
  std::map<std::string_view, const tensor::Tensor*> by_name;
  for (const tensor::Tensor& tensor : index.tensors) by_name[tensor.name] = &tensor;
  std::vector<Request> requests;
  for (const Slice& slice : slices) {
    Request request{.tensor = by_name.at(slice.name)};
    request.to = {.offset = target_bytes, .element_bytes = kElementBytes};
    const auto add = [&](uint64_t begin, uint64_t count) {
      request.items.push_back({.start = static_cast<int64_t>(begin), .stop = static_cast<int64_t>(begin + count)});
      request.to.shape.push_back(count);
    };
    if (request.tensor->shape.size() == 2) add(slice.row_begin, slice.row_count);
    add(slice.column_begin, slice.column_count);
    if (request.to.shape.size() == 2)
      request.to.strides.push_back(static_cast<int64_t>(slice.column_count * kElementBytes));
    request.to.strides.push_back(kElementBytes);
    target_bytes += slice.row_count * slice.column_count * kElementBytes;
    requests.push_back(std::move(request));
  }
  return requests;
}

// From index expressions to a checked plan: all that load_into does before the first byte moves.
Result<tensor::CopyPlan> compile(const tensor::Index& index, std::span<const Request> requests, uint64_t target_bytes) {
  std::vector<tensor::Wanted> wanted;
  for (const Request& request : requests) {
    TRY_ASSIGN(tensor::Strided from, tensor::resolve(*request.tensor, request.items, request.tensor->offset));
    wanted.push_back({.label = request.tensor->name,
                      .from = std::move(from),
                      .to = request.to,
                      .source_dtype = tensor::Dtype::bf16,
                      .target_dtype = tensor::Dtype::bf16});
  }
  TRY_ASSIGN(tensor::CopyPlan plan, tensor::compile(wanted));
  TRY(tensor::check_plan(plan, index.files[0].size_bytes, target_bytes));
  if (plan.target_bytes() != target_bytes) return base::fail(base::Code::internal, "the plan leaves gaps");
  return plan;
}

Status add_compile(Bench& bench, const char* name, std::span<const TensorShape> shapes, double most_ms,
                   std::optional<double> records_max) {
  const tensor::Index index = index_of(shapes);
  uint64_t target_bytes = 0;
  const auto requests = requests_of(index, rank_slices(shapes, 2, 1, Part::all), target_bytes);
  std::vector<double> times_ms;
  size_t record_count = 0;
  for (int round = 0; round < (bench.tiny() ? 2 : 200); ++round) {
    const int64_t begin_ns = base::monotonic_ns();
    TRY_ASSIGN(const tensor::CopyPlan plan, compile(index, requests, target_bytes));
    times_ms.push_back(static_cast<double>(base::monotonic_ns() - begin_ns) / 1e6);
    record_count = plan.records.size();
  }
  Figure time{.name = base::text(name, ", ", requests.size(), " slices"), .unit = "ms", .value = median(times_ms)};
  time.goal = at_most(most_ms);
  time.details = {{"p99_ms", quantile(times_ms, 0.99)}, {"iqr", spread(times_ms)}};
  bench.add(std::move(time));
  Figure records{.name = base::text(name, ", records"), .unit = "records", .value = static_cast<double>(record_count)};
  if (records_max) records.goal = at_most(*records_max);
  bench.add(std::move(records));
  return {};
}

}  // namespace

Status run_strided(Bench& bench) {
  std::map<uint64_t, std::vector<StridedShape>>
      by_width;  // one sheet, opened once, for all slices of rows of one width
  for (uint64_t row_bytes = 256; row_bytes <= kMiB; row_bytes *= 4) {
    for (const uint64_t factor : {2, 4, 8, 16}) by_width[row_bytes * factor].push_back({row_bytes, factor});
  }
  for (const uint64_t factor : {2, 4, 8}) by_width[kQwenRowBytes].push_back({kQwenRowBytes / factor, factor});
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  for (const auto& [width, shapes] : by_width) {
    TRY_ASSIGN(const std::string path, make_sheet(bench, bench.tiny() ? 16 * kMiB : 512 * kMiB, width));
    TRY(race_sheet(bench, path, shapes));
    TRY(daemon.evict(path));
  }
  return {};
}

Status run_tensor_parallel(Bench& bench) {
  const auto shapes = qwen_shapes(large_qwen(bench));
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "large.safetensors", shapes));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  TRY_ASSIGN(const auto model, open_ready(path));
  for (const Part part : {Part::all, Part::columns}) {
    for (const uint64_t rank_count : {2, 4, 8}) {
      TRY_ASSIGN(Gather gather, Gather::make(model, rank_slices(shapes, rank_count, 1, part)));
      const std::string name = base::text("tp", rank_count, part == Part::all ? ", all tensors" : ", column slices");
      TRY_ASSIGN(Figure figure, race_gather(bench, gather, name, path));
      figure.details["records"] = static_cast<double>(gather.last_report().record_count);
      figure.details["plan_ms"] = static_cast<double>(gather.last_report().plan_ns) / 1e6;
      bench.add(std::move(figure));
    }
  }
  return {};
}

Status run_faults(Bench& bench) {
  const auto shapes = qwen_shapes(large_qwen(bench));
  TRY_ASSIGN(const std::string path, make_checkpoint(bench, "large.safetensors", shapes));
  TRY_ASSIGN(const Daemon daemon, Daemon::start(bench.options()));
  TRY_ASSIGN(const auto model, open_ready(path));
  TRY_ASSIGN(Gather gather, Gather::make(model, rank_slices(shapes, 2, 1, Part::all)));
  TRY(gather.check(path));
  const uint64_t daemon_before = fault_count(daemon.pid());
  const uint64_t client_before = fault_count(::getpid());
  const AllocationWatch watch;
  TRY(gather.run_product());
  const AllocationCount allocations = watch.count();
  const uint64_t client_after = fault_count(::getpid());
  const uint64_t daemon_after = fault_count(daemon.pid());
  const auto add = [&](const char* name, uint64_t count, std::optional<Goal> goal) {
    bench.add({.name = name, .unit = "", .value = static_cast<double>(count), .goal = goal});
  };
  add("page faults of the daemon in a warm load_into", daemon_after - daemon_before, at_most(0));
  add("page faults of the client in it", client_after - client_before, {});
  if (!watch.works()) return {};
  add("allocations over 1 MiB in it", allocations.large, at_most(0));
  add("allocations in it", allocations.all, {});
  return {};
}

Status run_plan_compile(Bench& bench) {
  TRY(add_compile(bench, "Qwen3-14B, tp2", qwen_shapes(Qwen{}), 1, 1000));
  std::vector<TensorShape> experts;
  for (uint64_t number = 0; number < (bench.tiny() ? 64 : 6144); ++number) {
    const std::string name = base::text("model.layers.", number / 128, ".mlp.experts.", number % 128, ".");
    experts.push_back({name + "gate_proj.weight", {768, 2048}});
    experts.push_back({name + "up_proj.weight", {768, 2048}});
    experts.push_back({name + "down_proj.weight", {2048, 768}});
  }
  std::vector<TensorShape> downs;
  for (size_t at = 2; at < experts.size(); at += 3) downs.push_back(experts[at]);
  TRY(add_compile(bench, "6,144 experts, down_proj, tp2", downs, 20, {}));
  TRY(add_compile(bench, "6,144 experts, all three, tp2", experts, 20, {}));
  return {};
}

}  // namespace tensord::bench
