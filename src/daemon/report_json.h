// The engine's state as the JSON that docs/PROTOCOL.md describes.
#pragma once

#include <string>

#include "doctor/machine.h"
#include "engine/engine.h"

namespace tensord::daemon {

struct DaemonFacts {
  std::string version;
  uint32_t protocol = 0;
  std::string socket;
  std::string runtime_dir;
  std::string state_dir;
  int64_t started_ns = 0;
  int read_threads = 0;
  uint64_t gpu_memory_bytes = 0;
  size_t connection_count_max = 0;
  bool keep_spans = false;
};

std::string status_json(const DaemonFacts& facts, const engine::Engine& engine, size_t connection_count);
std::string list_json(const engine::Engine& engine);
std::string replica_json(const engine::Replica& replica);
std::string stop_json();
std::string verify_json(const engine::VerifyReport& report);
std::string explain_json(const engine::LoadReport& report, const std::optional<doctor::Rates>& rates);

}  // namespace tensord::daemon
