// The catalog in one SQLite file in WAL mode.
#pragma once

#include <memory>
#include <string>

#include "catalog/catalog.h"

namespace tensord::catalog {

// Creates `path` (mode 0600) when missing; its folder must exist. Schema version in PRAGMA user_version: an unknown
// newer one is Code::unsupported. A damaged file is Code::corrupt. Records of files not seen for
// kFileRecordCountMax newer ones are forgotten.
inline constexpr int kFileRecordCountMax = 100'000;
Result<std::unique_ptr<Catalog>> open_sqlite_catalog(const std::string& path);

}  // namespace tensord::catalog
