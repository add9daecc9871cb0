// This build's version, from CMakeLists.txt.
#pragma once

namespace tensord::client {

inline constexpr const char* kVersion = TENSORD_VERSION;

}  // namespace tensord::client
