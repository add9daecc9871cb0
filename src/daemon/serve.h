// `tensord serve`: the daemon's main.
#pragma once

namespace tensord::daemon {

// `argv[0]` is the verb. Returns the exit status (docs/OPERATING.md lists them).
int serve_main(int argc, char** argv);

}  // namespace tensord::daemon
