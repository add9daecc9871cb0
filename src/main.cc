// One binary: `tensord serve` is the daemon, every other verb is a client of it.
#include <string_view>

#include "cli/cli.h"
#include "daemon/config.h"
#include "daemon/serve.h"

int main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]) == "serve")
    return tensord::daemon::serve_main(argc - 1, argv + 1);
  return tensord::cli::cli_main(argc, argv, tensord::daemon::serve_help());
}
