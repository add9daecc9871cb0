#include "base/folders.h"

#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

namespace tensord::base {

std::string state_folder() {
  if (const char* folder = std::getenv("TENSORD_STATE_DIR"); folder != nullptr && *folder != '\0')
    return folder;
  if (const char* home = std::getenv("XDG_STATE_HOME"); home != nullptr && *home != '\0') {
    return std::string(home) + "/tensord";
  }
  const char* home = std::getenv("HOME");
  if (home == nullptr || *home == '\0') {
    const passwd* user = ::getpwuid(::getuid());
    home = user != nullptr ? user->pw_dir : "/tmp";
  }
  return std::string(home) + "/.local/state/tensord";
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
