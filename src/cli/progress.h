// Progress: waiting for a load in front of someone.
#pragma once

#include <cstdint>
#include <string>

#include "client/model.h"

namespace tensord::cli {

struct FillProgress {
  uint64_t ready_bytes = 0;
  uint64_t total_bytes = 0;
  uint64_t begin_bytes = 0;  // that were there when the watching began
  int64_t elapsed_ns = 0;    // since then
  int64_t idle_ns = 0;       // since the last byte came
};

// One line of at most `width` characters; the bar takes what the numbers leave:
//   [##########..........]  50 %  1.00 GiB of 2.00 GiB  3.41 GB/s  0.3 s left
std::string progress_line(const FillProgress& progress, int width);

// Waits until all of the model is there. `mode`: "always" shows a line on standard error that is written over
// and ends with a line feed, "never" shows nothing, "auto" shows it where standard error is a terminal.
// Errors as Model::wait; Code::cancelled after SIGINT (the daemon goes on filling). Not thread safe: it takes
// SIGINT while it waits.
base::Status watch_fill(const client::Model& model, const std::string& mode);

}  // namespace tensord::cli
