// A catalog in memory, with scripted faults, for tests.
#pragma once

#include <memory>
#include <optional>

#include "catalog/catalog.h"

namespace tensord::catalog {

class MemoryCatalog : public Catalog {
 public:
  // From now on every call fails with `fault`; nullopt ends that.
  virtual void set_fault(std::optional<base::Error> fault) = 0;
};

std::unique_ptr<MemoryCatalog> make_memory_catalog(const CatalogLimits& limits = {});

}  // namespace tensord::catalog
