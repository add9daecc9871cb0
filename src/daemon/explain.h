// Why a load took as long as it did: its phases over one time axis, what limited it, what was possible. Pure. Text, page,
// JSON and trace all show this one list of phases.
//
//   daemon     index  ##
//              read     ==================
//   python3 7  copy       ------------------##
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "doctor/machine.h"
#include "engine/report.h"

namespace tensord::daemon {

// Begin and end are on the axis; what several threads did in turn with other things is spread over all of it.
struct Phase {
  std::string lane;  // "daemon", or the client: "python3 7"
  const char* name = "";
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  int64_t thread_ns = 0;  // summed over the threads
  int64_t thread_count = 1;
  uint64_t bytes = 0;

  int64_t ns() const { return thread_ns / std::max<int64_t>(thread_count, 1); }  // of the wall clock
};

struct Explanation {
  bool resident = false;  // the replica was there when it was opened last: only what clients did since then
  int64_t origin_ns = 0;  // base::monotonic_ns at the axis' left end
  int64_t span_ns = 0;
  std::vector<Phase> phases;  // in the order of the path, client by client
  uint64_t moved_bytes = 0;   // loaded, or copied by the clients of a resident replica
  int64_t moved_ns = 0;       // in that time
  std::string limited_by;
  std::string advice;
  double possible = 0;      // bytes/s; 0: no constants of this machine, or no bytes
  std::string possible_by;  // which of them bounds it
};

Explanation explain(const engine::LoadReport& report, const std::optional<doctor::Rates>& rates);

}  // namespace tensord::daemon
