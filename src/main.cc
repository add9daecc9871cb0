// The compiled program: `tensord serve`, the daemon. Every other verb is the Python package's.
#include <cstdio>
#include <string_view>

#include "daemon/serve.h"

int main(int argc, char** argv) {
  const std::string_view verb = argc > 1 ? argv[1] : "";
  if (verb == "serve") return tensord::daemon::serve_main(argc - 1, argv + 1);
  if (verb == "--version") return std::puts("tensord " TENSORD_VERSION) < 0 ? 1 : 0;
  std::fprintf(stderr,
               "tensord: %s: this program knows `serve` and `--version`; all other verbs come with the Python package: "
               "`pip install tensord`, or `python -m tensord`\n",
               verb.empty() ? "no verb" : argv[1]);
  return 2;
}
