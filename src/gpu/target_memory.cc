#include "gpu/target_memory.h"

#include <numeric>

#include "base/bytes.h"

namespace tensord::gpu {

using base::Code;
using base::fail;

Result<uint64_t> bytes_from(const Driver& driver, Address address) {
  Address begin = 0;
  size_t size_bytes = 0;
  const Attribute asked[] = {kRangeBegin, kRangeBytes};
  void* values[] = {&begin, &size_bytes};
  TRY(driver.check(driver.describe(2, asked, values, address), "look at GPU memory"));
  return begin + size_bytes - address;
}

Result<std::shared_ptr<OpenedMemory>> OpenedMemory::open(const Driver& driver, int device, const Target& target,
                                                         int access) {
  std::shared_ptr<OpenedMemory> memory(new OpenedMemory(driver));
  TRY(target.ipc ? memory->open_ipc(target) : memory->map(device, target, access));
  return memory;
}

Status OpenedMemory::open_ipc(const Target& target) {
  TRY(driver_.check(driver_.ipc_open(&address_, *target.ipc, kPeers),
                    "open a client's GPU memory (both must see each other's processes: one PID namespace)"));
  ipc_ = true;
  TRY_ASSIGN(const uint64_t size_bytes, bytes_from(driver_, address_));
  if (size_bytes >= target.size_bytes) return {};
  return fail(Code::invalid_argument, "a target on a GPU is ", base::human_bytes(target.size_bytes),
              ", its memory only ", base::human_bytes(size_bytes));
}

Status OpenedMemory::map(int device, const Target& target, int access) {
  uint64_t total_bytes = 0;
  for (const auto& [fd, size_bytes] : target.allocations) total_bytes += size_bytes;
  TRY(driver_.check(driver_.reserve(&address_, total_bytes, 0, 0, 0), "reserve addresses for GPU memory"));
  reserved_bytes_ = total_bytes;
  Address at = address_;
  for (const auto& [fd, size_bytes] : target.allocations) {
    Allocation allocation = 0;
    void* const number = reinterpret_cast<void*>(static_cast<intptr_t>(fd.get()));
    TRY(driver_.check(driver_.import_fd(&allocation, number, 1), "import GPU memory"));
    const Answer mapped = driver_.map(at, size_bytes, 0, allocation, 0);
    driver_.free(allocation);  // the mapping keeps it
    TRY(driver_.check(mapped, "map GPU memory"));
    mapped_.push_back(size_bytes);
    at += size_bytes;
  }
  const Access allowed{.location = {.id = device}, .flags = access};
  return driver_.check(driver_.set_access(address_, total_bytes, &allowed, 1), "make GPU memory reachable");
}

OpenedMemory::~OpenedMemory() {
  if (ipc_) driver_.ipc_close(address_);
  Address at = address_;
  for (const uint64_t size_bytes : mapped_) {
    driver_.unmap(at, size_bytes);
    at += size_bytes;
  }
  if (reserved_bytes_ > 0) driver_.unreserve(address_, reserved_bytes_);
}

}  // namespace tensord::gpu
