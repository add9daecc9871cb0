// The engine's state as the JSON that docs/PROTOCOL.md describes.
#pragma once

#include <string>

#include "daemon/config.h"
#include "engine/engine.h"

namespace tensord::daemon {

// What the engine does not know.
struct Serving {
  int64_t started_ns = 0;
  size_t connection_count = 0;
  size_t connection_count_max = 0;
};

std::string status_json(const Config& config, const engine::Engine& engine, const Serving& serving);
std::string list_json(const engine::Engine& engine);
std::string replica_json(const engine::Replica& replica);
std::string stop_json();
std::string verify_json(const engine::Replica& replica, int64_t ns, const std::vector<engine::VerifyFault>& faults);
std::string explain_json(const engine::LoadReport& report);

}  // namespace tensord::daemon
