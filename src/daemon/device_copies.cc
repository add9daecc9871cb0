#include "daemon/device_copies.h"

#include <algorithm>

#include "memory/fill_map.h"

namespace tensord::daemon {

using base::Code;
using base::fail;

namespace {

Result<gpu::Uuid> uuid_of(const protocol::CopyToDevice& order) {
  gpu::Uuid uuid;
  if (order.device()->size() != uuid.size())
    return fail(Code::invalid_argument, "a GPU's UUID has 16 bytes, not ", order.device()->size());
  std::copy(order.device()->begin(), order.device()->end(), uuid.begin());
  return uuid;
}

// Targets with the descriptors that came for them.
Result<std::vector<gpu::Target>> take_targets(const protocol::CopyToDevice& order, std::vector<base::Fd> fds) {
  const auto& sizes = *order.allocation_bytes();
  if (sizes.size() != fds.size())
    return fail(Code::invalid_argument, sizes.size(), " allocations on a GPU came with ", fds.size(), " descriptors");
  std::vector<gpu::Target> targets;
  uint32_t next = 0;
  for (const protocol::DeviceTarget* told : *order.targets()) {
    gpu::Target& target = targets.emplace_back(gpu::Target{.size_bytes = told->size_bytes()});
    if (told->allocation_count() == 0) {
      target.ipc.emplace();
      std::copy(told->handle()->begin(), told->handle()->end(), target.ipc->begin());
    }
    if (told->allocation_count() > fds.size() - next)
      return fail(Code::invalid_argument, "targets on a GPU have more allocations than came with them");
    for (const uint32_t end = next + told->allocation_count(); next < end; ++next)
      target.allocations.emplace_back(std::move(fds[next]), sizes[next]);
  }
  return targets;
}

std::string text_of(const gpu::Uuid& uuid) {
  std::string text = "GPU-";
  for (size_t at = 0; at < uuid.size(); ++at) {
    constexpr const char* kDigits = "0123456789abcdef";
    if (at == 4 || at == 6 || at == 8 || at == 10) text += '-';
    text += kDigits[static_cast<unsigned char>(uuid[at]) >> 4];
    text += kDigits[static_cast<unsigned char>(uuid[at]) & 15];
  }
  return text;
}

}  // namespace

Result<gpu::Device*> DeviceCopies::device(const gpu::Uuid& uuid) {
  if (const auto known = devices_.find(uuid); known != devices_.end()) return known->second.get();
  if (options_.use == GpuUse::off) return fail(Code::unavailable, "this daemon uses no GPU (gpu is off)");
  TRY_ASSIGN(const gpu::Driver* driver, gpu::driver());
  int device_count = 0;
  TRY(driver->check(driver->device_count(&device_count), "count GPUs"));
  for (int number = 0; number < device_count; ++number) {
    gpu::Uuid one;
    if (driver->device_uuid(&one, number) != 0 || one != uuid) continue;
    auto used = std::make_unique<gpu::Device>(*driver, number, options_.idle_ms);
    return devices_.emplace(uuid, std::move(used)).first->second.get();
  }
  return fail(Code::unavailable, "the daemon does not see ", text_of(uuid),
              "; start it with all GPUs visible (CUDA_VISIBLE_DEVICES unset, in containers --gpus all)");
}

Result<std::unique_ptr<gpu::CopyJob>> DeviceCopies::make_job(rpc::Request& request, const engine::Replica& replica) {
  const protocol::CopyToDevice& order = *request.frame().request_as_CopyToDevice();
  auto job = std::make_unique<gpu::CopyJob>();
  job->client = request.client.connection;
  job->number = request.frame().id();
  job->image_bytes = replica.content->image_bytes;
  for (const memory::Segment& segment : replica.memory.segments)
    job->source.push_back({segment.data(), segment.size_bytes(), segment.slot()});
  TRY_ASSIGN(job->targets, take_targets(order, std::move(request.fds)));
  job->copies.reserve(order.copies()->size());
  for (const protocol::DeviceRows* rows : *order.copies()) {
    job->copies.push_back({rows->source_offset(), rows->target_offset(), rows->row_bytes(), rows->row_count(),
                           rows->source_pitch(), rows->target_pitch(), rows->target()});
  }
  TRY(gpu::check(*job));
  TRY_ASSIGN(base::Fd map, base::duplicate(replica.fill->fd()));
  TRY_ASSIGN(auto view, memory::FillView::open(map));
  const auto fill = std::make_shared<memory::FillView>(std::move(view));
  job->ready = [fill, content = replica.content](uint64_t begin, uint64_t end) -> Result<bool> {
    if (fill->state() == memory::FillState::ready) return true;
    if (fill->state() == memory::FillState::failed) return tl::unexpected(fill->error());
    const auto blocks = content->layout.blocks_of(begin, end - begin);
    return fill->has_blocks(blocks.first, blocks.last);
  };
  job->want = [this, content = replica.content, number = replica.number](uint64_t begin, uint64_t end) {
    const auto blocks = content->layout.blocks_of(begin, end - begin);
    loop_.post([this, number, blocks] { engine_.want(number, blocks.first, blocks.last); });
  };
  return job;
}

void DeviceCopies::copy(rpc::Request request, std::function<void(Result<gpu::DeviceReport>)> done) {
  const protocol::CopyToDevice& order = *request.frame().request_as_CopyToDevice();
  const auto uuid = uuid_of(order);
  if (!uuid) return done(base::pass_on(uuid));
  const auto used = device(*uuid);
  if (!used) return done(base::pass_on(used));
  const uint64_t number = order.replica();
  const auto held = engine_.hold(number);
  if (!held) return done(base::pass_on(held));
  auto job = make_job(request, **held);
  if (!job) {
    engine_.let_go(number);
    return done(base::pass_on(job));
  }
  (*job)->done = [this, number, done = std::move(done)](Result<gpu::DeviceReport> report) {
    loop_.post([this, number, done, report = std::move(report)] {
      engine_.let_go(number);
      done(report);
    });
  };
  (*used)->submit(std::move(*job));
}

void DeviceCopies::cancel(rpc::ConnectionId connection, uint64_t request) {
  for (const auto& [uuid, device] : devices_) device->cancel(connection, request);
}

void DeviceCopies::forget(rpc::ConnectionId connection) {
  for (const auto& [uuid, device] : devices_) device->forget(connection);
}

}  // namespace tensord::daemon
