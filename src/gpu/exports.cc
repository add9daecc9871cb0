#include "gpu/exports.h"

#include "gpu/pinned.h"

namespace tensord::gpu {

using base::Code;
using base::fail;

Result<std::optional<Exports::Place>> Exports::find(Address address, uint64_t size_bytes) {
  const auto behind = stretches_.upper_bound(address);
  if (behind != stretches_.begin()) {
    const auto& [begin, stretch] = *std::prev(behind);
    if (address + size_bytes <= stretch.end) {
      Place place = stretch.place;
      place.offset = address - begin;
      return place;
    }
  }
  int type = 0, device = 0, can_ipc = 0;
  uint64_t handle_types = 0;
  Address begin = 0;
  size_t range_bytes = 0;
  const Attribute asked[] = {kMemoryType, kDeviceOrdinal, kIpcCapable, kHandleTypes, kRangeBegin, kRangeBytes};
  void* values[] = {&type, &device, &can_ipc, &handle_types, &begin, &range_bytes};
  if (driver_.describe(6, asked, values, address) != 0 || type != kDeviceMemory) return std::nullopt;
  Target target;
  if (can_ipc != 0 && address + size_bytes <= begin + range_bytes) {
    TRY_ASSIGN(target, export_ipc(begin, device));
    target.size_bytes = range_bytes;
  } else if ((handle_types & 1) != 0) {
    begin = address;
    TRY_ASSIGN(target, export_fds(begin, address + size_bytes));
  } else {
    return fail(Code::unsupported,
                "this GPU memory cannot be shared with the daemon (of a pool, or made without a handle)");
  }
  ExportedDevice& exported = devices_[device];
  if (exported.targets.empty()) TRY(driver_.check(driver_.device_uuid(&exported.uuid, device), "ask for a GPU's UUID"));
  const Place place{device, static_cast<uint32_t>(exported.targets.size()), address - begin};
  stretches_[begin] = {begin + target.size_bytes, place};
  exported.targets.push_back(std::move(target));
  return place;
}

Result<Target> Exports::export_ipc(Address begin, int device) {
  const Current before(driver_, nullptr);
  TRY(driver_.check(before.answer(), "use a GPU"));
  TRY_ASSIGN(const auto primary, Primary::retain(driver_, device));
  Target target;
  TRY(driver_.check(driver_.ipc_export(&target.ipc.emplace(), begin), "share GPU memory with the daemon"));
  return target;
}

// Whole allocations, from the one that holds `begin` on; `begin` becomes its first byte.
Result<Target> Exports::export_fds(Address& begin, Address end) {
  Target target;
  for (Address at = begin; at < end;) {
    Address mapped = 0;
    size_t size_bytes = 0;
    const Attribute asked[] = {kMappedBegin, kMappedBytes};
    void* values[] = {&mapped, &size_bytes};
    TRY(driver_.check(driver_.describe(2, asked, values, at), "look at GPU memory"));
    Allocation allocation = 0;
    TRY(driver_.check(driver_.allocation_of(&allocation, reinterpret_cast<void*>(mapped)), "find GPU memory"));
    int fd = -1;
    const Answer answer = driver_.export_fd(&fd, allocation, 1, 0);
    driver_.free(allocation);
    TRY(driver_.check(answer, "share GPU memory with the daemon"));
    if (target.allocations.empty()) begin = mapped;
    target.allocations.emplace_back(base::Fd(fd), size_bytes);
    target.size_bytes += size_bytes;
    at = mapped + size_bytes;
  }
  return target;
}

}  // namespace tensord::gpu
