// Starting the per-user daemon from a client.
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"

namespace tensord::client {

// Runs `tensord serve` in a session of its own, with its log in the state folder (else in `runtime_folder`, else nowhere), and waits until it listens in
// `runtime_folder`. When another client was quicker, its daemon is waited for. The binary: $TENSORD_BINARY, else beside
// this library, else in the folder bin there (as wheels have it), else on $PATH. Code::unavailable says what was tried and
// where the log is.
base::Status start_daemon(const std::string& runtime_folder, int64_t timeout_ms);

}  // namespace tensord::client
