// The command line: every verb but those that are daemons themselves.
#pragma once

#include <string>

namespace tensord::cli {

// `argv[0]` is the program. Returns the exit status: 0 done; 1 the verb failed (the error is on standard error); 2 the
// command line makes no sense; 3 no daemon runs; 4 the bytes are corrupt or changed; 130 interrupted while it waited.
// `serve_help` is what the daemon says of its own flags.
int cli_main(int argc, char** argv, const std::string& serve_help);

}  // namespace tensord::cli
