#include "daemon/report_json.h"

#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "daemon/machine.h"
#include "rpc/frame.h"
#include "rpc/unix_socket.h"

// What has the same names here and there.
namespace tensord::storage {
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(SourceCounters, cached_bytes, direct_bytes, buffered_bytes)
}
namespace tensord::engine {
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(LoadCounters, bytes, read_ns, check_ns, touch_ns)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Use, pid, name, begin_ns, map_begin_ns, map_ns, plan_ns, wait_ns, copy_ns,
                                   copy_bytes, device_bytes, record_count, thread_count)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(LoadReport, load, replica, path, tensor_count, whole_tensor_count, begin_ns, fill_ns,
                                   reopened_ns, wall_ns, index_ns, memory_ns, cpu_ns, disk_bytes, read_path, notes,
                                   uses)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(VerifyFault, file, tensor, leaf, offset, size_bytes)
}  // namespace tensord::engine

namespace tensord::daemon {

using nlohmann::json;

namespace {

// Paths and names may hold any bytes: what is not UTF-8 is replaced.
std::string dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }

const char* state_name(engine::ReplicaState state) {
  static constexpr const char* kNames[] = {"indexing", "waiting", "filling", "ready", "failed"};
  return kNames[static_cast<size_t>(state)];
}

json error_json(const std::optional<base::Error>& error) {
  if (!error) return nullptr;
  return {{"code", base::code_name(error->code)}, {"message", error->message}};
}

// Of a selection: what was asked for, the first of it. Null: all tensors.
json only_value(const std::vector<std::string>& only) {
  constexpr size_t kShownMax = 16;
  if (only.empty()) return nullptr;
  return json(std::vector(only.begin(), only.begin() + static_cast<ptrdiff_t>(std::min(only.size(), kShownMax))));
}

json replica_value(const engine::Replica& replica) {
  const int64_t now_ns = base::monotonic_ns();
  json leases = json::array();
  for (const auto& [number, lease] : replica.leases) {
    leases.push_back({{"pid", lease.holder.process_id},
                      {"name", lease.holder.process_name},
                      {"held_s", static_cast<double>(now_ns - lease.since_ns) / 1e9}});
  }
  json waiters = json::array();
  for (const engine::Waiter& waiter : replica.waiters) {
    const int64_t since_ns = std::max(waiter.asked_ns, replica.room_ns);
    waiters.push_back({{"pid", waiter.holder.process_id},
                       {"name", waiter.holder.process_name},
                       {"waited_s", static_cast<double>(now_ns - since_ns) / 1e9}});
  }
  json value = {{"replica", replica.number},
                {"path", replica.path()},
                {"paths", replica.paths},
                {"artifact", replica.artifact ? json(replica.artifact->to_text()) : json()},
                {"state", state_name(replica.state)},
                {"error", error_json(replica.error)},
                {"device", replica.key.device.empty() ? json() : json(replica.key.device)},
                {"memory_bytes", replica.memory_bytes()},
                {"pinned", replica.pinned},
                {"leases", leases},
                {"waiters", waiters},
                {"waits_for", replica.waits_for},
                {"idle_s", replica.held() ? 0.0 : static_cast<double>(now_ns - replica.last_used_ns) / 1e9}};
  if (replica.content != nullptr) {
    value["payload_bytes"] = replica.content->index.payload_bytes();
    value["total_bytes"] = replica.content->layout.block_bytes();
    value["ready_bytes"] = replica.fill ? replica.fill->ready_bytes() : 0;
    value["tensor_count"] = replica.content->index.tensors.size();
    const engine::Content* whole = replica.content->whole.get();
    value["whole_tensor_count"] = (whole == nullptr ? *replica.content : *whole).index.tensors.size();
    value["only"] = only_value(replica.key.only);
    value["files"] = json::array();
    for (const auto& file : replica.content->index.files) value["files"].push_back(file.path);
  }
  return value;
}

// Keeps the report below what a frame can carry (64 MiB): about 65 bytes a span.
constexpr size_t kTraceCountMax = 800'000;

// Rows that explaining.py names: what it was, thread, begin, end, bytes, and which block or record. It was a read (0), a
// check (1), or a copy of use 0 (2), of use 1 (3), and so on.
json trace_value(const engine::LoadReport& report) {
  json rows = json::array();
  for (const engine::LoadSpan& span : report.spans)
    rows.push_back({span.kind, span.thread, span.begin_ns, span.end_ns, span.size_bytes, span.block});
  for (size_t use = 0; use < report.uses.size(); ++use) {
    for (const memory::CopySpan& span : report.uses[use].spans) {
      if (rows.size() == kTraceCountMax) return rows;
      rows.push_back({use + 2, span.thread, span.begin_ns, span.end_ns, span.size_bytes, span.record});
    }
  }
  return rows;
}

}  // namespace

std::string status_json(const Config& config, const engine::Engine& engine, const Serving& serving) {
  const uint64_t memory_limit = cgroup_memory_limit();
  return dump({{"pid", ::getpid()},
               {"version", TENSORD_VERSION},
               {"protocol", rpc::kProtocolVersion},
               {"socket", rpc::socket_path(config.runtime_dir)},
               {"runtime_dir", config.runtime_dir},
               {"state_dir", config.state_dir},
               {"machine", this_machine()},
               {"memory_limit", memory_limit == UINT64_MAX ? json() : json(memory_limit)},
               {"uptime_s", static_cast<double>(base::monotonic_ns() - serving.started_ns) / 1e9},
               {"limits",
                {{"host_memory", engine.memory().limit_bytes()},
                 {"gpu_memory", config.gpu_memory},
                 {"read_threads", config.read_threads},
                 {"connections", serving.connection_count_max}}},
               {"memory", {{"in_use", engine.memory().in_use_bytes()}, {"kept", engine.memory().kept_bytes()}}},
               {"replicas", engine.replicas().size()},
               {"loads_running", engine.running_count() - engine.waiting_count()},
               {"loaded_bytes", engine.loaded_bytes()},
               {"disk_bytes", engine::disk_bytes_read()},
               {"connections", serving.connection_count}});
}

std::string list_json(const engine::Engine& engine) {
  json replicas = json::array();
  json loads = json::array();
  for (const engine::LoadReport& report : engine.reports()) {
    loads.push_back({{"replica", report.replica}, {"path", report.path}});
  }
  for (const auto& [number, replica] : engine.replicas()) {
    if (replica->state != engine::ReplicaState::indexing) replicas.push_back(replica_value(*replica));
    if (replica->state <= engine::ReplicaState::waiting)
      loads.push_back({{"replica", number}, {"path", replica->path()}});
  }
  return dump({{"replicas", replicas}, {"loads", loads}, {"last", engine.last_opened()}});
}

std::string replica_json(const engine::Replica& replica) { return dump(replica_value(replica)); }

std::string stop_json() { return dump({{"pid", ::getpid()}}); }

std::string verify_json(const engine::Replica& replica, int64_t ns, const std::vector<engine::VerifyFault>& faults) {
  return dump({{"replica", replica.number},
               {"path", replica.path()},
               {"artifact", replica.artifact->to_text()},
               {"leaf_count", replica.leaves.size()},
               {"bytes", replica.content->index.payload_bytes()},
               {"ns", ns},
               {"faults", faults}});
}

std::string explain_json(const engine::LoadReport& report) {
  json value = report;
  value.update(report.counters);
  value.update(report.source);
  value.update({{"only", only_value(report.only)},
                {"artifact", report.artifact ? json(report.artifact->to_text()) : json()},
                {"state", state_name(report.state)},
                {"error", error_json(report.error)},
                {"read_threads", report.thread_count},
                {"checked_against", report.checked_against_record ? "recorded" : "first_load"},
                {"trace", trace_value(report)}});
  return dump(value);
}

}  // namespace tensord::daemon
