#include "daemon/report_json.h"

#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/clock.h"

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

// Bytes of replicas on each device.
json gpus_value(const engine::Engine& engine) {
  std::map<std::string, uint64_t> bytes;
  for (const auto& [number, replica] : engine.replicas()) {
    if (!replica->key.device.empty()) bytes[replica->key.device] += replica->device_bytes;
  }
  return bytes;
}

json uses_value(const std::vector<engine::Use>& uses) {
  json values = json::array();
  for (const engine::Use& use : uses) {
    values.push_back({{"pid", use.process_id},
                      {"name", use.process_name},
                      {"begin_ns", use.begin_ns},
                      {"map_begin_ns", use.map_begin_ns},
                      {"map_ns", use.map_ns},
                      {"plan_ns", use.plan_ns},
                      {"wait_ns", use.wait_ns},
                      {"copy_ns", use.copy_ns},
                      {"copy_bytes", use.copy_bytes},
                      {"device_bytes", use.device_bytes},
                      {"record_count", use.record_count},
                      {"thread_count", use.thread_count}});
  }
  return values;
}

// Keeps the report below what a frame can carry (64 MiB): about 130 bytes a span.
constexpr size_t kTraceCountMax = 400'000;

json trace_value(const engine::LoadReport& report) {
  json trace = json::array();
  for (const engine::LoadSpan& span : report.spans) {
    if (trace.size() == kTraceCountMax) break;
    trace.push_back({{"name", span.kind == engine::LoadSpan::Kind::read ? "read" : "check"},
                     {"thread", "daemon read " + std::to_string(span.thread)},
                     {"begin_ns", span.begin_ns},
                     {"end_ns", span.end_ns},
                     {"bytes", span.size_bytes},
                     {"block", span.block}});
  }
  for (const engine::Use& use : report.uses) {
    for (const memory::CopySpan& span : use.spans) {
      if (trace.size() == kTraceCountMax) break;
      trace.push_back(
          {{"name", "copy"},
           {"thread", use.process_name + " " + std::to_string(use.process_id) + " copy " + std::to_string(span.thread)},
           {"begin_ns", span.begin_ns},
           {"end_ns", span.end_ns},
           {"bytes", span.size_bytes},
           {"record", span.record}});
    }
  }
  return trace;
}

// Who waits for memory.
json waiting_value(const engine::Engine& engine) {
  json all = json::array();
  for (const auto& [number, replica] : engine.replicas()) {
    if (replica->state != engine::ReplicaState::waiting) continue;
    for (const engine::Waiter& waiter : replica->waiters) {
      const int64_t since_ns = std::max(waiter.asked_ns, replica->room_ns);
      all.push_back({{"pid", waiter.holder.process_id},
                     {"name", waiter.holder.process_name},
                     {"path", replica->path()},
                     {"waited_s", static_cast<double>(base::monotonic_ns() - since_ns) / 1e9},
                     {"waits_for", replica->waits_for}});
    }
  }
  return all;
}

}  // namespace

std::string status_json(const DaemonFacts& facts, const engine::Engine& engine, size_t connection_count) {
  return dump({{"pid", ::getpid()},
               {"version", facts.version},
               {"protocol", facts.protocol},
               {"socket", facts.socket},
               {"runtime_dir", facts.runtime_dir},
               {"state_dir", facts.state_dir},
               {"uptime_s", static_cast<double>(base::monotonic_ns() - facts.started_ns) / 1e9},
               {"limits",
                {{"host_memory", engine.memory().limit_bytes()},
                 {"gpu_memory", facts.gpu_memory_bytes},
                 {"read_threads", facts.read_threads},
                 {"connections", facts.connection_count_max}}},
               {"memory", {{"in_use", engine.memory().in_use_bytes()}, {"kept", engine.memory().kept_bytes()}}},
               {"gpus", gpus_value(engine)},
               {"replicas", engine.replicas().size()},
               {"loads_running", engine.running_count() - engine.waiting_count()},
               {"waiting", waiting_value(engine)},
               {"loaded_bytes", engine.loaded_bytes()},
               {"disk_bytes", engine::disk_bytes_read()},
               {"connections", connection_count}});
}

std::string list_json(const engine::Engine& engine) {
  json replicas = json::array();
  for (const auto& [number, replica] : engine.replicas()) {
    if (replica->state != engine::ReplicaState::indexing) replicas.push_back(replica_value(*replica));
  }
  return dump({{"replicas", replicas}});
}

std::string replica_json(const engine::Replica& replica) { return dump(replica_value(replica)); }

std::string stop_json() { return dump({{"pid", ::getpid()}}); }

std::string verify_json(const engine::VerifyReport& report) {
  json faults = json::array();
  for (const engine::VerifyFault& fault : report.faults) {
    faults.push_back({{"file", fault.file},
                      {"tensor", fault.tensor},
                      {"leaf", fault.leaf},
                      {"offset", fault.offset},
                      {"size_bytes", fault.size_bytes}});
  }
  return dump({{"replica", report.replica},
               {"path", report.path},
               {"artifact", report.artifact.to_text()},
               {"leaf_count", report.leaf_count},
               {"bytes", report.bytes},
               {"ns", report.ns},
               {"faults", faults}});
}

std::string explain_json(const engine::LoadReport& report, const std::optional<doctor::Rates>& rates) {
  json value = {{"load", report.load},
                {"replica", report.replica},
                {"path", report.path},
                {"only", only_value(report.only)},
                {"tensor_count", report.tensor_count},
                {"whole_tensor_count", report.whole_tensor_count},
                {"artifact", report.artifact ? json(report.artifact->to_text()) : json()},
                {"state", state_name(report.state)},
                {"error", error_json(report.error)},
                {"begin_ns", report.begin_ns},
                {"fill_ns", report.fill_ns},
                {"reopened_ns", report.reopened_ns},
                {"wall_ns", report.wall_ns},
                {"index_ns", report.index_ns},
                {"memory_ns", report.memory_ns},
                {"touch_ns", report.counters.touch_ns},
                {"read_ns", report.counters.read_ns},
                {"check_ns", report.counters.check_ns},
                {"bytes", report.counters.bytes},
                {"read_threads", report.thread_count},
                {"cpu_ns", report.cpu_ns},
                {"disk_bytes", report.disk_bytes},
                {"cached_bytes", report.source.cached_bytes},
                {"direct_bytes", report.source.direct_bytes},
                {"buffered_bytes", report.source.buffered_bytes},
                {"read_path", report.read_path},
                {"notes", report.notes},
                {"checked_against", report.checked_against_record ? "recorded" : "first_load"},
                {"rates", rates ? json(rates->bytes_per_s) : json()},
                {"uses", uses_value(report.uses)}};
  json trace = trace_value(report);
  if (!trace.empty()) value["trace"] = std::move(trace);
  return dump(value);
}

}  // namespace tensord::daemon
