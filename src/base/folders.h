// Folders of this user, and the environment that names them.
#pragma once

#include <string>

#include "base/result.h"

namespace tensord::base {

// The value of an environment variable, empty when it is not set.
std::string environment(const char* name);

// $TENSORD_STATE_DIR, else $XDG_STATE_HOME/tensord, else ~/.local/state/tensord.
std::string state_folder();

// Makes `path` and what is missing above it, with mode 0700.
Status make_folders(const std::string& path);

}  // namespace tensord::base
