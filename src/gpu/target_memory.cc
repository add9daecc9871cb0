#include "gpu/target_memory.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/text.h"

namespace tensord::gpu {

using base::Code;
using base::fail;

namespace {
constexpr uint64_t kAllocationBytesMax = uint64_t{2} << 30;
constexpr uint64_t kGranularityBytes = 2 << 20;
}  // namespace

Result<std::vector<std::pair<base::Fd, uint64_t>>> make_memory(const Driver& driver, int device, uint64_t size_bytes) {
  std::vector<std::pair<base::Fd, uint64_t>> made;
  const AllocationKind kind{.location = {.id = device}};
  for (uint64_t left = base::align_up(size_bytes, kGranularityBytes); left > 0; left -= made.back().second) {
    const uint64_t bytes = std::min(left, kAllocationBytesMax);
    Allocation allocation = 0;
    int fd = -1;
    TRY(driver.check(driver.allocate(&allocation, bytes, &kind, 0), "make memory on a GPU"));
    const Answer exported = driver.export_fd(&fd, allocation, kByDescriptor, 0);
    driver.free(allocation);  // the descriptor keeps it
    TRY(driver.check(exported, "share memory on a GPU"));
    made.emplace_back(base::Fd(fd), bytes);
  }
  return made;
}

Result<std::string> device_uuid(const std::string& name) {
  if (name.starts_with("GPU-")) return name;
  TRY_ASSIGN(const Driver* known, driver());
  TRY_ASSIGN(const int device, find_device(*known, name));
  Uuid uuid{};
  TRY(known->check(known->device_uuid(&uuid, device), "ask for a GPU's UUID"));
  return text_of(uuid);
}

Result<int> find_device(const Driver& driver, const std::string& name) {
  int device_count = 0;
  TRY(driver.check(driver.device_count(&device_count), "count GPUs"));
  for (int number = 0; number < device_count; ++number) {
    Uuid uuid{};
    TRY(driver.check(driver.device_uuid(&uuid, number), "ask for a GPU's UUID"));
    if (name == text_of(uuid) || name == base::text("cuda:", number)) return number;
  }
  return fail(Code::invalid_argument, base::quoted(name), " is no GPU of this process; it has ", device_count,
              ", from cuda:0 on");
}

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

Result<std::shared_ptr<ReadMemory>> ReadMemory::open(const Driver& driver, int device, const Target& memory) {
  const Current before(driver, nullptr);
  TRY(driver.check(before.answer(), "use a GPU"));
  auto read = std::make_shared<ReadMemory>();
  TRY_ASSIGN(read->held_->primary, Primary::retain(driver, device));
  TRY_ASSIGN(read->held_->opened, OpenedMemory::open(driver, device, memory, kReadOnly));
  return read;
}

ReadMemory::~ReadMemory() {
  if (process_ != ::getpid()) static_cast<void>(held_.release());
  if (held_ == nullptr || held_->primary == nullptr) return;
  const Driver& driver = held_->primary->driver();
  const Current current(driver, held_->primary->handle());
  driver.finish();
  held_->opened.reset();
}

}  // namespace tensord::gpu
