#include "daemon/device_copies.h"

#include <algorithm>

#include "memory/fill_map.h"

namespace tensord::daemon {

using base::Code;
using base::fail;
using base::Status;

namespace {

Result<std::string> device_of(const protocol::CopyToDevice& order) {
  gpu::Uuid uuid;
  if (order.device()->size() != uuid.size())
    return fail(Code::invalid_argument, "a GPU's UUID has 16 bytes, not ", order.device()->size());
  std::copy(order.device()->begin(), order.device()->end(), uuid.begin());
  return gpu::text_of(uuid);
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

// Of a replica on a device, with descriptors of its own.
Result<gpu::Target> memory_of(const engine::Replica& replica) {
  gpu::Target memory{.size_bytes = replica.image_bytes};
  for (const auto& [fd, size_bytes] : replica.allocations) {
    TRY_ASSIGN(base::Fd copy, base::duplicate(fd.get()));
    memory.allocations.emplace_back(std::move(copy), size_bytes);
  }
  return memory;
}

// What copies a whole image to a device: each tensor to where it lies there.
std::vector<gpu::DeviceCopy> copies_between(const engine::Replica& source, const engine::Replica& target) {
  if (!source.key.device.empty()) return {{.row_bytes = target.image_bytes}};
  std::vector<gpu::DeviceCopy> copies;
  const tensor::Windows& from = source.content->layout.windows;
  for (const tensor::Window& window : tensor::device_windows_of(target.content->index).list) {
    const tensor::Tensor place{.file = window.file, .offset = window.file_offset, .size_bytes = window.size_bytes};
    copies.push_back({.source_offset = from.image_offset(place),
                      .target_offset = window.image_offset,
                      .row_bytes = window.size_bytes});
  }
  return copies;
}

}  // namespace

Result<DeviceCopies::Used*> DeviceCopies::use(const std::string& device) {
  if (const auto known = devices_.find(device); known != devices_.end()) return &known->second;
  if (options_.use == GpuUse::off) return fail(Code::unavailable, "this daemon uses no GPU (gpu is off)");
  TRY_ASSIGN(const gpu::Driver* driver, gpu::driver());
  const auto number = gpu::find_device(*driver, device);
  if (number) {
    Used used{*number, std::make_unique<gpu::Device>(*driver, *number, options_.idle_ms)};
    return &devices_.emplace(device, std::move(used)).first->second;
  }
  if (number.error().code != Code::invalid_argument) return base::pass_on(number);
  return fail(Code::unavailable, "the daemon does not see ", device,
              "; start it with all GPUs visible (CUDA_VISIBLE_DEVICES unset, in containers --gpus all)");
}

// Without targets and copies. On a device, a replica is read when it is ready.
Result<std::unique_ptr<gpu::CopyJob>> DeviceCopies::job_out_of(const engine::Replica& replica,
                                                               const std::string& device) {
  auto job = std::make_unique<gpu::CopyJob>();
  job->image_bytes = replica.image_bytes;
  const bool on_device = !replica.key.device.empty();
  if (on_device) {
    if (!reaches(device, replica.key.device))
      return fail(Code::unavailable, device, " cannot read the memory of ", replica.key.device);
    TRY_ASSIGN(job->device_source, memory_of(replica));
    job->source.push_back({.size_bytes = replica.image_bytes});
  }
  for (const memory::Segment& segment : replica.memory.segments)
    job->source.push_back({segment.data(), segment.size_bytes(), segment.slot()});
  TRY_ASSIGN(base::Fd map, base::duplicate(replica.fill->fd()));
  TRY_ASSIGN(auto view, memory::FillView::open(map));
  const auto fill = std::make_shared<memory::FillView>(std::move(view));
  job->ready = [fill, on_device, content = replica.content](uint64_t begin, uint64_t end) -> Result<bool> {
    if (fill->state() == memory::FillState::ready) return true;
    if (fill->state() == memory::FillState::failed) return tl::unexpected(fill->error());
    const auto blocks = content->layout.blocks_of(begin, end - begin);
    return !on_device && fill->has_blocks(blocks.first, blocks.last);
  };
  job->want = [this, content = replica.content, number = replica.number](uint64_t begin, uint64_t end) {
    const auto blocks = content->layout.blocks_of(begin, end - begin);
    loop_.post([this, number, blocks] { engine_.want(number, blocks.first, blocks.last); });
  };
  return job;
}

Result<std::unique_ptr<gpu::CopyJob>> DeviceCopies::client_job(rpc::Request& request, const engine::Replica& replica,
                                                               const std::string& device) {
  const protocol::CopyToDevice& order = *request.frame().request_as_CopyToDevice();
  TRY_ASSIGN(auto job, job_out_of(replica, device));
  job->client = request.client.connection;
  job->number = request.frame().id();
  TRY_ASSIGN(job->targets, take_targets(order, std::move(request.fds)));
  job->copies.reserve(order.copies()->size());
  for (const protocol::DeviceRows* rows : *order.copies()) {
    job->copies.push_back({rows->source_offset(), rows->target_offset(), rows->row_bytes(), rows->row_count(),
                           rows->source_pitch(), rows->target_pitch(), rows->target()});
  }
  TRY(gpu::check(*job));
  return job;
}

void DeviceCopies::copy(rpc::Request request, std::function<void(Result<gpu::DeviceReport>)> done) {
  const protocol::CopyToDevice& order = *request.frame().request_as_CopyToDevice();
  const auto device = device_of(order);
  if (!device) return done(base::pass_on(device));
  const auto used = use(*device);
  if (!used) return done(base::pass_on(used));
  const uint64_t number = order.replica();
  const auto held = engine_.hold(number);
  if (!held) return done(base::pass_on(held));
  auto job = client_job(request, **held, *device);
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
  (*used)->device->submit(std::move(*job));
}

void DeviceCopies::cancel(rpc::ConnectionId connection, uint64_t request) {
  for (const auto& [uuid, used] : devices_) used.device->cancel(connection, request);
}

void DeviceCopies::forget(rpc::ConnectionId connection) {
  for (const auto& [uuid, used] : devices_) used.device->forget(connection);
}

// ---- replicas on devices ---------------------------------------------------------------------------------------

void DeviceCopies::make(const std::string& device, uint64_t size_bytes,
                        std::function<void(Result<engine::Allocations>)> done) {
  const auto used = use(device);
  if (!used) return loop_.post([done, why = used.error()] { done(tl::unexpected(why)); });
  (*used)->device->make(size_bytes, [this, done](Result<engine::Allocations> made) {
    // Shared, because work can be copied.
    auto shared = std::make_shared<Result<engine::Allocations>>(std::move(made));
    loop_.post([done, shared] { done(std::move(*shared)); });
  });
}

void DeviceCopies::fill(const engine::Replica& source, engine::Replica& target, std::function<void(Status)> done) {
  const auto used = use(target.key.device);
  auto job = used ? job_out_of(source, target.key.device) : base::pass_on(used);
  auto memory = memory_of(target);
  if (job && !memory) job = base::pass_on(memory);
  if (!job) return loop_.post([done, why = job.error()] { done(tl::unexpected(why)); });
  (*job)->targets.push_back(std::move(*memory));
  (*job)->copies = copies_between(source, target);
  if (source.key.device.empty()) {
    (*job)->copied = [&target, next = size_t{0}](uint64_t image_end) mutable {
      const auto& blocks = target.content->layout.blocks;
      for (; next < blocks.size() && blocks[next].image_offset + blocks[next].size_bytes <= image_end; ++next)
        target.fill->mark_block(next, blocks[next].size_bytes);
    };
  }
  (*job)->done = [this, done = std::move(done)](const Result<gpu::DeviceReport>& report) {
    loop_.post([done, status = report ? Status() : base::pass_on(report)] { done(status); });
  };
  (*used)->device->submit(std::move(*job));
}

bool DeviceCopies::reaches(const std::string& device, const std::string& peer) {
  if (device == peer) return true;
  const auto one = use(device), other = use(peer);
  const auto driver = gpu::driver();
  int can = 0;
  return one && other && driver && (*driver)->can_reach(&can, (*one)->number, (*other)->number) == 0 && can != 0;
}

}  // namespace tensord::daemon
