#include "client/device_copy.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <thread>

namespace tensord::client {

using base::Code;
using base::fail;
using protocol::CopiedToDeviceT;
using tensor::Copy2D;

namespace {

constexpr uint64_t kOuterIterationsMax = 1 << 16;
constexpr size_t kRowsPerRequest = 200'000;       // 11 MB
constexpr size_t kDescriptorsPerRequest = 1'900;  // a frame carries 2,048

// What goes to one device, in requests that fit a frame.
class DeviceRequests {
 public:
  DeviceRequests(const gpu::ExportedDevice& device, uint64_t replica) : device_(device), replica_(replica) {}

  Status add(const Copy2D& record, uint64_t source_offset, const gpu::Exports::Place& place) {
    const uint32_t target = place.target;
    if (requests_.empty() || order().copies.size() == kRowsPerRequest ||
        requests_.back().fds.size() + device_.targets[target].allocations.size() > kDescriptorsPerRequest) {
      requests_.emplace_back();
      numbers_.clear();
      order().replica = replica_;
      order().device.assign(device_.uuid.begin(), device_.uuid.end());
    }
    const auto [known, added] = numbers_.try_emplace(target, static_cast<uint32_t>(numbers_.size()));
    if (added) TRY(add_target(device_.targets[target]));
    const bool one = record.row_count == 1;
    if (one && !added && continues(order().copies, source_offset, place.offset, known->second)) {
      const protocol::DeviceRows last = order().copies.back();
      order().copies.back() = {last.source_offset(), last.target_offset(), last.row_bytes() + record.row_bytes, 1, 0, 0,
                               known->second};
      return {};
    }
    order().copies.emplace_back(source_offset, place.offset, record.row_bytes, record.row_count,
                                one ? 0 : record.source_pitch, one ? 0 : record.target_pitch, known->second);
    return {};
  }

  Result<CopiedToDeviceT> run(Connection& connection, const int32_t* cancel) {
    CopiedToDeviceT sum;
    for (Request& request : requests_) {
      auto answer = connection.ask(request_of(std::move(request.order)), std::move(request.fds), cancel);
      if (!answer && sum.bytes > 0) answer.error().target = base::TargetState::dirty;
      if (!answer) return base::pass_on(answer);
      const auto* copied = answer->frame().reply_as_CopiedToDevice();
      if (copied == nullptr) return fail(Code::corrupt, "the daemon answered a copy with something else");
      sum.bytes += copied->bytes();
      sum.prepare_ns += copied->prepare_ns();
      sum.wait_ns += copied->wait_ns();
      sum.copy_ns += copied->copy_ns();
    }
    return sum;
  }

 private:
  struct Request {
    protocol::CopyToDeviceT order;
    std::vector<base::Fd> fds;
  };
  protocol::CopyToDeviceT& order() { return requests_.back().order; }

  // Small tensors lie side by side in files, and where they were made one after another in memory too.
  static bool continues(const std::vector<protocol::DeviceRows>& rows, uint64_t source, uint64_t target_offset,
                        uint32_t target) {
    if (rows.empty()) return false;
    const protocol::DeviceRows& last = rows.back();
    return last.row_count() == 1 && last.target() == target && last.source_offset() + last.row_bytes() == source &&
           last.target_offset() + last.row_bytes() == target_offset;
  }

  Status add_target(const gpu::Target& target) {
    std::array<uint8_t, sizeof(gpu::IpcHandle)> handle{};
    if (target.ipc) std::copy(target.ipc->begin(), target.ipc->end(), handle.begin());
    order().targets.emplace_back(target.size_bytes, static_cast<uint32_t>(target.allocations.size()),
                                 flatbuffers::make_span(handle));
    for (const auto& [fd, size_bytes] : target.allocations) {
      TRY_ASSIGN(base::Fd copy, base::duplicate(fd.get()));
      requests_.back().fds.push_back(std::move(copy));
      order().allocation_bytes.push_back(size_bytes);
    }
    return {};
  }

  const gpu::ExportedDevice& device_;
  const uint64_t replica_;
  std::vector<Request> requests_;
  std::map<uint32_t, uint32_t> numbers_;  // of targets in the newest request
};

bool can_go_elsewhere(const base::Error& error) {
  const bool unable = error.code == Code::unavailable || error.code == Code::unsupported ||
                      error.code == Code::denied || error.code == Code::exhausted;
  return unable && error.target != base::TargetState::dirty;
}

}  // namespace

Result<Connection*> DeviceConnections::get(int device) {
  base::MutexLock lock(mutex_);
  std::unique_ptr<Connection>& connection = connections_[device];
  if (connection == nullptr) {
    TRY_ASSIGN(connection, Connection::open(autostart_));
  }
  return connection.get();
}

bool can_copy_to_device(const Copy2D& record) {
  if (record.casts() || record.row_bytes < gpu::kRowBytesMin) return false;
  if (record.outer_iterations() > kOuterIterationsMax) return false;
  if (record.row_count == 1) return true;
  const auto is_fit = [&](int64_t pitch) {
    return pitch >= static_cast<int64_t>(record.row_bytes) && pitch <= static_cast<int64_t>(gpu::kPitchMax);
  };
  return record.row_bytes <= gpu::kPitchMax && is_fit(record.source_pitch) && is_fit(record.target_pitch);
}

Result<CopiedToDeviceT> copy_to_devices(const tensor::CopyPlan& plan, gpu::Address target, gpu::Exports& exports,
                                        uint64_t replica, DeviceConnections& connections, const int32_t* cancel,
                                        std::map<int, base::Error>* refused) {
  std::map<int, DeviceRequests> devices;
  for (const Copy2D& record : plan.records) {
    const uint64_t extent = (record.row_count - 1) * static_cast<uint64_t>(record.target_pitch) + record.row_bytes;
    for (uint64_t iteration = 0; iteration < record.outer_iterations(); ++iteration) {
      const auto [source_offset, target_offset] = record.place(iteration);
      TRY_ASSIGN(const std::optional<gpu::Exports::Place> place, exports.find(target + target_offset, extent));
      if (!place) return fail(Code::invalid_argument, "a target is no GPU memory any more");
      auto& requests = devices.try_emplace(place->device, exports.devices().at(place->device), replica).first->second;
      TRY(requests.add(record, source_offset, *place));
    }
  }
  std::vector<std::optional<Result<CopiedToDeviceT>>> results(devices.size());
  std::vector<std::thread> threads;
  size_t at = 0;
  for (auto& [number, requests] : devices) {
    const auto run = [&, &result = results[at], &order = requests, device = number] {
      const auto connection = connections.get(device);
      result = connection ? order.run(**connection, cancel) : base::pass_on(connection);
    };
    if (++at == devices.size()) run();
    if (at < devices.size()) threads.emplace_back(run);
  }
  for (std::thread& thread : threads) thread.join();
  CopiedToDeviceT sum;
  std::optional<base::Error> error;
  at = 0;
  for (const auto& [number, requests] : devices) {
    const Result<CopiedToDeviceT>& done = *results[at++];
    if (!done && refused != nullptr && can_go_elsewhere(done.error())) {
      refused->emplace(number, done.error());
    } else if (!done && !error) {
      error = done.error();
    }
    if (!done) continue;
    sum.bytes += done->bytes;
    sum.prepare_ns = std::max(sum.prepare_ns, done->prepare_ns);
    sum.wait_ns = std::max(sum.wait_ns, done->wait_ns);
    sum.copy_ns = std::max(sum.copy_ns, done->copy_ns);
  }
  if (error && sum.bytes > 0) error->target = base::TargetState::dirty;
  if (error) return tl::unexpected(*error);
  return sum;
}

}  // namespace tensord::client
