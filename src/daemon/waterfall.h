// Why a load took as long as it did: its path as bars over one time axis, what limited it, what was possible. Pure.
//
//   daemon   index  ##
//            read     ==================
//   python3  copy       ------------------##
#pragma once

#include <string>
#include <vector>

#include "daemon/machine.h"
#include "engine/report.h"

namespace tensord::daemon {

struct Bar {
  std::string lane;  // "daemon", "python3 7"
  std::string name;  // as the phases of PROTOCOL.md
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  double busy = 1;  // share of the bar's threads' time that the phase had
  uint64_t bytes = 0;
};

struct Waterfall {
  bool resident = false;  // the replica was there when it was opened last: only what clients did since then
  int64_t origin_ns = 0;  // base::monotonic_ns at the axis' left end
  int64_t span_ns = 0;
  std::vector<Bar> bars;  // in the order of the path, client by client
  uint64_t bytes = 0;     // loaded, or copied by the clients of a resident replica
  std::string limited_by;
  std::string advice;
  double possible = 0;      // bytes/s; 0: no constants of this machine, or no bytes
  std::string possible_by;  // which of them bounds it
};

Waterfall waterfall_of(const engine::LoadReport& report, const std::optional<MachineRates>& rates);

}  // namespace tensord::daemon
