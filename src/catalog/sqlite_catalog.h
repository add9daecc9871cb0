// The catalog in one SQLite file in WAL mode.
#pragma once

#include <memory>
#include <string>

#include "catalog/catalog.h"

namespace tensord::catalog {

struct SqliteOptions {
  CatalogLimits limits;
  int busy_timeout_ms = 1000;  // how long a call waits for another process; then Code::unavailable
};

// Creates `path` (mode 0600) when missing; its folder must exist. Schema version in PRAGMA user_version: a
// newer one is Code::unsupported, a damaged file or another program's database Code::corrupt, one that cannot
// be written Code::denied. Several processes may have it open.
Result<std::unique_ptr<Catalog>> open_sqlite_catalog(const std::string& path,
                                                     const SqliteOptions& options = {});

}  // namespace tensord::catalog
