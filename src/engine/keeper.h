// Who stores what is to outlive this process, as the engine tells it.
#pragma once

#include <cstdint>

#include "engine/replica.h"

namespace tensord::engine {

class Keeper {
 public:
  virtual ~Keeper() = default;
  // All are called on the engine's thread; none waits.

  // A ready replica as it is now, without its leases.
  virtual void keep(const Replica& replica) = 0;
  virtual void keep_lease(const Replica& replica, uint64_t lease) = 0;
  virtual void drop_lease(const Replica& replica, uint64_t lease) = 0;
  virtual void drop(uint64_t replica) = 0;  // with its leases; also what was never kept
};

}  // namespace tensord::engine
