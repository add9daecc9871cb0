#include "base/folders.h"

#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

namespace tensord::base {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

std::string state_folder() {
  if (std::string folder = environment("TENSORD_STATE_DIR"); !folder.empty()) return folder;
  if (const std::string home = environment("XDG_STATE_HOME"); !home.empty()) return home + "/tensord";
  std::string home = environment("HOME");
  if (home.empty()) {
    const passwd* user = ::getpwuid(::getuid());
    home = user != nullptr ? user->pw_dir : "/tmp";
  }
  return home + "/.local/state/tensord";
}

Status make_folders(const std::string& path) {
  for (size_t at = path.find('/', 1);; at = path.find('/', at + 1)) {
    const std::string folder = path.substr(0, at);
    if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
      return fail_errno(errno, "make folder ", folder);
    }
    if (at == std::string::npos) return {};
  }
}

}  // namespace tensord::base
