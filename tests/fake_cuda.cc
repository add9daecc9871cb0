// A GPU driver for machines without GPU: the functions of libcuda.so.1 that src/gpu/driver.cc looks up, over memory that
// processes share.
//
//   device memory   a memfd, mapped; its IPC handle names process and descriptor, others open /proc/PID/fd/N
//   copies          wait in their stream until an event behind them, or the stream, is waited for: who forgets that finds
//                   bytes missing. Those whose memory or stream goes before are counted as `stray`
//   a primary       what a device keeps for a process; what still belongs to it when it goes is counted as `lost`
//
// FAKE_CUDA_DEVICES (1), FAKE_CUDA_VERSION (13000), FAKE_CUDA_MEMORY_MIB of each device, FAKE_CUDA_PEERS (1): whether
// they reach each other
// FAKE_CUDA_FAIL     "cuMemHostRegister_v2=801,cuIpcOpenMemHandle_v2=1@3": answers; here from the third call on. What
//                    frees something does so all the same
// FAKE_CUDA_COUNTS   a file that always tells what this process holds
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <vector>

#include "fake_cuda_state.h"

using namespace tensord::gpu;

namespace {

std::map<std::string, Fault> parse_faults(const char* text) {
  std::map<std::string, Fault> faults;
  std::istringstream words(text == nullptr ? "" : text);
  for (std::string word; std::getline(words, word, ',');) {
    const size_t name_size = word.find('=');
    Fault& fault = faults[word.substr(0, name_size)];
    std::sscanf(word.c_str() + name_size, "=%d@%d", &fault.answer, &fault.from);
  }
  return faults;
}

State& state() {
  // Threads may outlive main().
  static State& forever = *std::make_unique<State>(parse_faults(std::getenv("FAKE_CUDA_FAIL"))).release();
  return forever;
}
thread_local int current = -1;  // device

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}
bool has_device(int device) { return device >= 0 && device < std::min(setting("FAKE_CUDA_DEVICES", 1), kDevicesMax); }
bool can_reach(int device, int peer) { return device == peer || setting("FAKE_CUDA_PEERS", 1) != 0; }
bool has_primary() { return current >= 0 && state().primaries[current] > 0; }

// ---- counts and faults ----

std::map<std::string, long> counts() {
  State& all = state();
  const auto size = [](const auto& container) { return static_cast<long>(container.size()); };
  std::map<std::string, long> counts = {{"registrations", size(all.hosts)},
                                        {"mappings", size(all.mapped)},
                                        {"allocations", size(all.allocations)},
                                        {"streams", size(all.streams)},
                                        {"events", size(all.events)},
                                        {"stray", all.stray_count},
                                        {"lost", all.lost_count},
                                        {"opened", 0},
                                        {"reservations", 0}};
  for (const auto& [begin, range] : all.ranges) {
    if (range.kind == Kind::ipc) ++counts["opened"];
    if (range.kind == Kind::reserved) ++counts["reservations"];
  }
  counts["primaries"] = std::count_if(all.primaries, all.primaries + kDevicesMax, [](int one) { return one > 0; });
  return counts;
}

void write_counts() {
  static const char* const path = std::getenv("FAKE_CUDA_COUNTS");
  static const int fd = path == nullptr ? -1 : ::open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
  static std::map<std::string, long> written;
  if (fd < 0) return;
  const auto now = counts();
  if (now == std::exchange(written, now)) return;
  std::string text;
  for (const auto& [name, count] : now) {
    char line[64];
    text.append(line, std::snprintf(line, sizeof line, "%-16s%10ld\n", name.c_str(), count));
  }
  if (::pwrite(fd, text.data(), text.size(), 0) < 0) std::abort();
}

// What all functions do: one at a time, and the answer of a fault in place of their own.
template <typename Body>
Answer call(const char* name, const Body& body) {
  const std::lock_guard lock(state().mutex);
  const auto fault = state().faults.find(name);
  if (fault != state().faults.end() && ++fault->second.call_count >= fault->second.from) return fault->second.answer;
  const Answer answer = body();
  write_counts();
  return answer;
}
// Those that need a current device.
template <typename Body>
Answer call_on_device(const char* name, const Body& body) {
  return call(name, [&] { return has_primary() ? body() : kInvalidPrimary; });
}
// Those that free something: they do so, then answer the fault.
template <typename Body>
Answer call_freeing(const char* name, const Body& body) {
  {
    const std::lock_guard lock(state().mutex);
    const Answer answer = body();
    write_counts();
    if (answer != 0) return answer;
  }
  return call(name, [] { return 0; });
}

// ---- memory ----

uint64_t rounded(uint64_t size, uint64_t unit) { return (size + unit - 1) / unit * unit; }

Range* find(std::map<Address, Range>& ranges, Address address) {
  const auto behind = ranges.upper_bound(address);
  if (behind == ranges.begin()) return nullptr;
  Range& range = std::prev(behind)->second;
  return address < range.end ? &range : nullptr;
}
Range* find(Address address, Kind kind) {
  Range* range = find(kind == Kind::mapped ? state().mapped
                      : kind == Kind::host ? state().hosts
                                           : state().ranges,
                      address);
  return range != nullptr && range->kind == kind ? range : nullptr;
}
// What is device memory at an address.
Range* find_device(Address address) {
  Range* range = find(state().ranges, address);
  return range != nullptr && range->kind == Kind::reserved ? find(state().mapped, address) : range;
}

// Addresses one after another, so that allocations may touch; the last are given again when they are free.
Address take_addresses(uint64_t size, uint64_t alignment) {
  State& all = state();
  if (all.arena == 0) {
    void* arena = ::mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) std::abort();
    all.arena = rounded(reinterpret_cast<Address>(arena), kGranularity);
  }
  const Address end = all.ranges.empty() ? all.arena : all.ranges.rbegin()->second.end;
  const Address begin = rounded(end, alignment);
  return size > all.arena + kArenaBytes - kGranularity - begin ? 0 : begin;
}

bool map_at(Address begin, uint64_t size, int fd, int protection) {
  const int how = MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED);
  return ::mmap(reinterpret_cast<void*>(begin), rounded(size, kPage), protection, how, fd, 0) != MAP_FAILED;
}

int make_memory(uint64_t size) {
  const int fd = ::memfd_create("fake-cuda", MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(size)) != 0) std::abort();
  return fd;
}
// Memory that is handed around in descriptors tells its device by its name. As long as this process has a descriptor of it,
// it counts.
int device_of(int fd) {
  char name[64] = "";
  int device = 0;
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  if (::readlink(link.c_str(), name, sizeof name - 1) < 0) return -1;
  return std::sscanf(name, "/memfd:fake-cuda-gpu%d", &device) == 1 ? device : -1;
}
uint64_t taken_bytes(int device) {
  std::map<ino_t, uint64_t> sizes;
  for (int fd = 0; fd < 4096; ++fd) {
    struct stat about {};
    if (device_of(fd) == device && ::fstat(fd, &about) == 0) sizes[about.st_ino] = static_cast<uint64_t>(about.st_size);
  }
  uint64_t sum = 0;
  for (const auto& [inode, size] : sizes) sum += size;
  return sum;
}
// -1 where the device has no more.
int make_device_memory(int device, uint64_t size) {
  const auto most = static_cast<uint64_t>(setting("FAKE_CUDA_MEMORY_MIB", 1 << 20)) << 20;
  if (taken_bytes(device) + size > most) return -1;
  const int fd = ::memfd_create(("fake-cuda-gpu" + std::to_string(device)).c_str(), MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(size)) != 0) std::abort();
  return fd;
}

bool is_writable(Address address) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  char line[512];
  unsigned long begin = 0, end = 0;
  char mode = '-';
  bool found = false;
  while (!found && std::fgets(line, sizeof line, maps) != nullptr)
    found = std::sscanf(line, "%lx-%lx %*c%c", &begin, &end, &mode) == 3 && begin <= address && address < end;
  std::fclose(maps);
  return mode == 'w';
}

// Of a descriptor that somebody gave; 0 when it is no device memory.
uint64_t memory_bytes(int fd) {
  char name[64] = "";
  struct stat about {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  if (::readlink(link.c_str(), name, sizeof name - 1) < 0 || std::strstr(name, "memfd:fake-cuda") == nullptr) return 0;
  return ::fstat(fd, &about) == 0 ? static_cast<uint64_t>(about.st_size) : 0;
}

void let_go(Allocation number) {
  Memory& memory = state().allocations.at(number);
  if (--memory.use_count > 0) return;
  ::close(memory.fd);
  state().allocations.erase(number);
}

Answer free_range(std::map<Address, Range>& ranges, Address begin) {
  const Range range = ranges.at(begin);
  for (const Stream& stream : state().streams) {
    for (const Copy& copy : stream.waiting)
      state().stray_count += range.meets(copy.target, copy.target_end()) || range.meets(copy.source, copy.source_end());
  }
  if (range.kind != Kind::host) map_at(range.begin, range.end - range.begin, -1, PROT_NONE);
  if (range.fd >= 0) ::close(range.fd);
  ranges.erase(begin);
  if (range.kind == Kind::mapped) let_go(range.allocation);
  return 0;
}

// ---- copies ----

// Copies run from one mapping into the next, but not from one allocation into another.
bool can_write(Address begin, Address end) {
  const Range* const first = find_device(begin);
  for (const Range* range = first; range != nullptr && range->writable; range = find_device(range->end)) {
    if (end <= range->end) return true;
    if (range->kind != Kind::mapped) return false;
  }
  return false;
}
bool can_read(Address begin, Address end) {
  for (const Range* range = find_device(begin); range != nullptr; range = find_device(range->end)) {
    if (end <= range->end) return true;
    if (range->kind != Kind::mapped) return false;
  }
  for (const Range* range = find(begin, Kind::host); range != nullptr; range = find(range->end, Kind::host)) {
    if (end <= range->end) return true;
  }
  return false;
}

Stream* stream_at(Handle handle) {
  for (Stream& stream : state().streams) {
    if (&stream == handle && stream.owner == current) return &stream;
  }
  return nullptr;
}
Event* event_at(Handle handle) {
  for (Event& event : state().events) {
    if (&event == handle) return &event;
  }
  return nullptr;
}

Answer check(const Copy& copy, Handle stream) {
  if (stream_at(stream) == nullptr) return kInvalidHandle;
  const auto [narrow, wide] = std::minmax(copy.target_pitch, copy.source_pitch);
  const bool is_fit = copy.row_bytes > 0 && copy.row_count > 0 && narrow >= copy.row_bytes &&
                      (copy.row_count == 1 || wide < uint64_t{1} << 31);
  return is_fit && can_write(copy.target, copy.target_end()) && can_read(copy.source, copy.source_end())
             ? 0
             : kInvalidValue;
}
Answer queue(const std::vector<Copy>& copies, Handle stream) {
  for (const Copy& copy : copies) {
    if (const Answer answer = check(copy, stream); answer != 0) return answer;
  }
  auto& waiting = stream_at(stream)->waiting;
  waiting.insert(waiting.end(), copies.begin(), copies.end());
  return 0;
}
Copy flat(Address target, Address source, size_t size) {
  return {.target = target, .source = source, .row_bytes = size, .target_pitch = size, .source_pitch = size};
}

Answer run(Stream& stream, uint64_t until) {
  for (; stream.done_count < until; ++stream.done_count, stream.waiting.pop_front()) {
    const Copy& copy = stream.waiting.front();
    if (!can_write(copy.target, copy.target_end()) || !can_read(copy.source, copy.source_end())) return kIllegalAddress;
    for (size_t row = 0; row < copy.row_count; ++row) {
      std::memcpy(reinterpret_cast<void*>(copy.target + row * copy.target_pitch),
                  reinterpret_cast<const void*>(copy.source + row * copy.source_pitch), copy.row_bytes);
    }
  }
  return 0;
}

size_t end_streams(const auto& which) {
  return std::erase_if(state().streams, [&](const Stream& stream) {
    if (which(stream)) state().stray_count += static_cast<long>(stream.waiting.size());
    return which(stream);
  });
}

void end_primary(int device) {
  State& all = state();
  const auto belongs = [&](const auto& one) { return one.owner == device; };
  size_t lost = end_streams(belongs) + std::erase_if(all.events, belongs);
  for (auto* ranges : {&all.ranges, &all.hosts}) {
    for (auto at = ranges->begin(); at != ranges->end();) {
      const auto one = at++;
      if (!belongs(one->second)) continue;
      free_range(*ranges, one->first);
      ++lost;
    }
  }
  all.lost_count += static_cast<long>(lost);
}

}  // namespace

extern "C" {

// ---- the driver's functions ----

Answer cuInit(unsigned flags) {
  return call("cuInit", [&] { return flags == 0 ? 0 : kInvalidValue; });
}
Answer cuDriverGetVersion(int* version) {
  return call("cuDriverGetVersion", [&] { return *version = setting("FAKE_CUDA_VERSION", 13000), 0; });
}
Answer cuGetErrorName(Answer answer, const char** name) {
  static const std::map<Answer, const char*> names = {{1, "CUDA_ERROR_INVALID_VALUE"},
                                                      {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                      {100, "CUDA_ERROR_NO_DEVICE"},
                                                      {101, "CUDA_ERROR_INVALID_DEVICE"},
                                                      {201, "CUDA_ERROR_INVALID_CONTEXT"},
                                                      {400, "CUDA_ERROR_INVALID_HANDLE"},
                                                      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                                                      {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
                                                      {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
                                                      {800, "CUDA_ERROR_NOT_PERMITTED"},
                                                      {801, "CUDA_ERROR_NOT_SUPPORTED"},
                                                      {999, "CUDA_ERROR_UNKNOWN"}};
  const auto found = names.find(answer);
  *name = found == names.end() ? nullptr : found->second;
  return call("cuGetErrorName", [&] { return *name == nullptr ? kInvalidValue : 0; });
}

Answer cuDeviceGetCount(int* count) {
  return call("cuDeviceGetCount", [&] { return *count = setting("FAKE_CUDA_DEVICES", 1), 0; });
}
Answer cuDeviceGetUuid_v2(Uuid* uuid, int device) {
  return call("cuDeviceGetUuid_v2", [&] {
    *uuid = {'f', 'a', 'k', 'e', static_cast<char>('0' + device)};
    return has_device(device) ? 0 : kInvalidDevice;
  });
}

Answer cuDeviceCanAccessPeer(int* can, int device, int peer) {
  return call("cuDeviceCanAccessPeer", [&] {
    *can = device != peer && can_reach(device, peer);
    return has_device(device) && has_device(peer) ? 0 : kInvalidDevice;
  });
}

Answer cuDevicePrimaryCtxRetain(Handle* handle, int device) {
  return call("cuDevicePrimaryCtxRetain", [&] {
    if (!has_device(device)) return kInvalidDevice;
    ++state().primaries[device];
    *handle = &state().primaries[device];
    return 0;
  });
}
Answer cuDevicePrimaryCtxRelease_v2(int device) {
  return call_freeing("cuDevicePrimaryCtxRelease_v2", [&] {
    if (!has_device(device) || state().primaries[device] == 0) return kInvalidPrimary;
    if (--state().primaries[device] == 0) end_primary(device);
    return 0;
  });
}
Answer cuCtxSetCurrent(Handle handle) {
  return call("cuCtxSetCurrent", [&] {
    const auto device = handle == nullptr ? -1 : static_cast<int*>(handle) - state().primaries;
    if (handle != nullptr && (device < 0 || device >= kDevicesMax || state().primaries[device] == 0))
      return kInvalidPrimary;
    current = static_cast<int>(device);
    return 0;
  });
}
Answer cuCtxGetCurrent(Handle* handle) {
  return call("cuCtxGetCurrent", [&] { return *handle = current < 0 ? nullptr : &state().primaries[current], 0; });
}

Answer cuCtxSynchronize() {
  return call_on_device("cuCtxSynchronize", [&] {
    for (Stream& stream : state().streams) {
      if (stream.owner != current) continue;
      if (const Answer answer = run(stream, stream.done_count + stream.waiting.size()); answer != 0) return answer;
    }
    return 0;
  });
}

// Of what is no device memory: zeros, as the driver does.
Answer cuPointerGetAttributes(unsigned count, const Attribute* attributes, void** values, Address address) {
  return call("cuPointerGetAttributes", [&] {
    const Range* found = find_device(address);
    const bool is_mapped = found != nullptr && found->kind == Kind::mapped;
    const Range range = found == nullptr ? Range{} : *found;
    const Range whole = is_mapped ? *find(state().ranges, address) : range;
    const std::map<int, uint64_t> known = {{kMemoryType, kDeviceMemory},
                                           {kDeviceOrdinal, static_cast<uint64_t>(range.device)},
                                           {kIpcCapable, range.kind == Kind::plain},
                                           {kRangeBegin, whole.begin},
                                           {kRangeBytes, whole.end - whole.begin},
                                           {kHandleTypes, is_mapped},
                                           {kMappedBytes, range.end - range.begin},
                                           {kMappedBegin, range.begin}};
    for (unsigned at = 0; at < count; ++at) {
      if (known.count(attributes[at]) == 0) return kInvalidValue;
      const uint64_t value = found == nullptr ? 0 : known.at(attributes[at]);
      std::memcpy(values[at], &value, attributes[at] <= kIpcCapable ? sizeof(int) : sizeof value);
    }
    return 0;
  });
}

Answer cuMemHostRegister_v2(void* data, size_t size, unsigned flags) {
  return call_on_device("cuMemHostRegister_v2", [&] {
    const auto begin = reinterpret_cast<Address>(data);
    unsigned char page = 0;
    const bool known = flags == kPortable || flags == (kPortable | kHostReadOnly);
    if (size == 0 || !known || begin % kPage != 0 || ::mincore(data, kPage, &page) != 0) return kInvalidValue;
    if (flags == kPortable && !is_writable(begin)) return kInvalidValue;
    for (const auto& [at, range] : state().hosts) {
      if (range.meets(begin, begin + size)) return kRegistered;
    }
    state().hosts[begin] = {.kind = Kind::host, .begin = begin, .end = begin + size, .owner = current};
    return 0;
  });
}
Answer cuMemHostUnregister(void* data) {
  return call_freeing("cuMemHostUnregister", [&] {
    if (!has_primary()) return kInvalidPrimary;
    const auto found = state().hosts.find(reinterpret_cast<Address>(data));
    if (found == state().hosts.end() || found->second.owner != current) return kNotRegistered;
    return free_range(state().hosts, found->first);
  });
}

Answer cuStreamCreate(Handle* handle, unsigned) {
  return call_on_device("cuStreamCreate", [&] {
    *handle = &state().streams.emplace_back(Stream{.owner = current});
    return 0;
  });
}
Answer cuStreamDestroy_v2(Handle handle) {
  return call_freeing("cuStreamDestroy_v2", [&] {
    return end_streams([&](const Stream& one) { return &one == handle; }) == 1 ? 0 : kInvalidHandle;
  });
}
Answer cuStreamSynchronize(Handle handle) {
  return call_on_device("cuStreamSynchronize", [&] {
    Stream* stream = stream_at(handle);
    return stream == nullptr ? kInvalidHandle : run(*stream, stream->done_count + stream->waiting.size());
  });
}
Answer cuEventCreate(Handle* handle, unsigned) {
  return call_on_device("cuEventCreate", [&] {
    *handle = &state().events.emplace_back(Event{.owner = current});
    return 0;
  });
}
Answer cuEventDestroy_v2(Handle handle) {
  return call_freeing("cuEventDestroy_v2", [&] {
    return std::erase_if(state().events, [&](const Event& one) { return &one == handle; }) == 1 ? 0 : kInvalidHandle;
  });
}
Answer cuEventRecord(Handle handle, Handle on) {
  return call_on_device("cuEventRecord", [&] {
    Event* event = event_at(handle);
    Stream* stream = stream_at(on);
    if (event == nullptr || stream == nullptr || event->owner != stream->owner) return kInvalidHandle;
    event->stream = stream;
    event->behind = stream->done_count + stream->waiting.size();
    return 0;
  });
}
Answer cuEventSynchronize(Handle handle) {
  return call("cuEventSynchronize", [&] {
    const Event* event = event_at(handle);
    if (event == nullptr) return kInvalidHandle;
    return event->stream == nullptr ? 0 : run(*event->stream, event->behind);
  });
}

Answer cuMemcpyHtoDAsync_v2(Address target, Address source, size_t size, Handle stream) {
  return call_on_device("cuMemcpyHtoDAsync_v2", [&] { return queue({flat(target, source, size)}, stream); });
}
Answer cuMemcpyDtoDAsync_v2(Address target, Address source, size_t size, Handle stream) {
  return call_on_device("cuMemcpyDtoDAsync_v2", [&] { return queue({flat(target, source, size)}, stream); });
}
Answer cuMemcpy2DAsync_v2(const Rows* rows, Handle stream) {
  return call_on_device("cuMemcpy2DAsync_v2", [&] {
    if (rows->source.type < 1 || rows->source.type > 2 || rows->target.type != 2) return kInvalidValue;
    const Address source = rows->source.type == 1 ? reinterpret_cast<Address>(rows->source.host) : rows->source.device;
    return queue(
        {{rows->target.device, source, rows->row_bytes, rows->row_count, rows->target.pitch, rows->source.pitch}},
        stream);
  });
}
Answer cuMemcpyBatchAsync_v2(Address* targets, Address* sources, size_t* sizes, size_t count, BatchKind*,
                             size_t* kind_begins, size_t kind_count, Handle stream) {
  return call_on_device("cuMemcpyBatchAsync_v2", [&] {
    if (kind_count != 1 || *kind_begins != 0) return kInvalidValue;
    std::vector<Copy> copies;
    for (size_t at = 0; at < count; ++at) copies.push_back(flat(targets[at], sources[at], sizes[at]));
    return queue(copies, stream);
  });
}

Answer cuIpcGetMemHandle(IpcHandle* handle, Address address) {
  return call_on_device("cuIpcGetMemHandle", [&] {
    const Range* range = find(address, Kind::plain);
    if (range == nullptr || range->device != current) return kInvalidValue;
    const Shared shared{.process = ::getpid(),
                        .fd = range->fd,
                        .device = range->device,
                        .size_bytes = range->end - range->begin,
                        .serial = range->serial};
    static_assert(sizeof shared == sizeof *handle);
    std::memcpy(handle, &shared, sizeof shared);
    return 0;
  });
}
// Also of this process itself, which the driver refuses.
Answer cuIpcOpenMemHandle_v2(Address* address, IpcHandle handle, unsigned flags) {
  return call_on_device("cuIpcOpenMemHandle_v2", [&] {
    Shared shared;
    std::memcpy(static_cast<void*>(&shared), &handle, sizeof shared);
    if (std::strcmp(shared.magic, "fakecud") != 0 || flags != kPeers) return kInvalidValue;
    const uint64_t serial = shared.serial << 32 | static_cast<uint64_t>(shared.process);
    for (auto& [begin, range] : state().ranges) {
      if (range.kind != Kind::ipc || range.serial != serial || range.owner != current) continue;
      ++range.opened_count;
      *address = begin;
      return 0;
    }
    const std::string path = "/proc/" + std::to_string(shared.process) + "/fd/" + std::to_string(shared.fd);
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) return kInvalidValue;
    const Address begin =
        memory_bytes(fd) < shared.size_bytes ? 0 : take_addresses(rounded(shared.size_bytes, kPage), kPage);
    const bool opened = begin != 0 && map_at(begin, shared.size_bytes, fd, PROT_READ | PROT_WRITE);
    ::close(fd);
    if (!opened) return kInvalidValue;
    *address = begin;
    state().ranges[begin] = {.kind = Kind::ipc,
                             .begin = begin,
                             .end = begin + shared.size_bytes,
                             .device = shared.device,
                             .owner = current,
                             .serial = serial};
    return 0;
  });
}
Answer cuIpcCloseMemHandle(Address address) {
  return call_freeing("cuIpcCloseMemHandle", [&] {
    Range* range = find(address, Kind::ipc);
    if (!has_primary()) return kInvalidPrimary;
    if (range == nullptr || range->begin != address || range->owner != current) return kInvalidValue;
    return --range->opened_count > 0 ? 0 : free_range(state().ranges, address);
  });
}

Answer cuMemCreate(Allocation* handle, size_t size, const AllocationKind* kind, uint64_t flags) {
  return call("cuMemCreate", [&] {
    const int device = kind->location.id;
    if (size == 0 || size % kGranularity != 0 || kind->type != 1 || kind->location.type != 1 || flags != 0 ||
        kind->handle_types != kByDescriptor || !has_device(device))
      return kInvalidValue;
    const int fd = make_device_memory(device, size);
    if (fd < 0) return kOutOfMemory;
    *handle = state().next++;
    state().allocations[*handle] = {.fd = fd, .device = device, .size_bytes = size};
    return 0;
  });
}
Answer cuMemRelease(Allocation handle) {
  return call_freeing("cuMemRelease",
                      [&] { return state().allocations.count(handle) == 0 ? kInvalidValue : (let_go(handle), 0); });
}
Answer cuMemRetainAllocationHandle(Allocation* handle, void* address) {
  return call("cuMemRetainAllocationHandle", [&] {
    const Range* range = find(reinterpret_cast<Address>(address), Kind::mapped);
    if (range == nullptr) return kInvalidValue;
    *handle = range->allocation;
    ++state().allocations.at(*handle).use_count;
    return 0;
  });
}
Answer cuMemExportToShareableHandle(int* fd, Allocation handle, int type, uint64_t) {
  return call("cuMemExportToShareableHandle", [&] {
    if (state().allocations.count(handle) == 0 || type != 1) return kInvalidValue;
    *fd = ::fcntl(state().allocations.at(handle).fd, F_DUPFD_CLOEXEC, 0);
    return *fd < 0 ? kOutOfMemory : 0;
  });
}
Answer cuMemImportFromShareableHandle(Allocation* handle, void* number, int type) {
  return call("cuMemImportFromShareableHandle", [&] {
    const int fd = static_cast<int>(reinterpret_cast<intptr_t>(number));
    if (type != 1 || memory_bytes(fd) == 0) return kInvalidValue;
    *handle = state().next++;
    state().allocations[*handle] = {
        .fd = ::fcntl(fd, F_DUPFD_CLOEXEC, 0), .device = std::max(device_of(fd), 0), .size_bytes = memory_bytes(fd)};
    return 0;
  });
}
Answer cuMemAddressReserve(Address* address, size_t size, size_t, Address, uint64_t) {
  return call("cuMemAddressReserve", [&] {
    if (size == 0 || size % kGranularity != 0) return kInvalidValue;
    *address = take_addresses(size, kGranularity);
    if (*address == 0) return kOutOfMemory;
    state().ranges[*address] = {.kind = Kind::reserved, .begin = *address, .end = *address + size};
    return 0;
  });
}
Answer cuMemAddressFree(Address address, size_t size) {
  return call_freeing("cuMemAddressFree", [&] {
    const Range* range = find(address, Kind::reserved);
    if (range == nullptr || range->begin != address || range->end != address + size) return kInvalidValue;
    for (const auto& [begin, mapped] : state().mapped) {
      if (range->meets(begin, mapped.end)) return kInvalidValue;
    }
    return free_range(state().ranges, address);
  });
}
Answer cuMemMap(Address address, size_t size, size_t offset, Allocation handle, uint64_t) {
  return call("cuMemMap", [&] {
    const Range* reserved = find(address, Kind::reserved);
    const auto memory = state().allocations.find(handle);
    if (reserved == nullptr || memory == state().allocations.end() || size == 0 || size % kGranularity != 0 ||
        offset != 0 || size > memory->second.size_bytes || size > reserved->end - address)
      return kInvalidValue;
    for (const auto& [begin, mapped] : state().mapped) {
      if (mapped.meets(address, address + size)) return kInvalidValue;
    }
    if (!map_at(address, size, memory->second.fd, PROT_NONE)) return kOutOfMemory;
    ++memory->second.use_count;
    state().mapped[address] = {.kind = Kind::mapped,
                               .begin = address,
                               .end = address + size,
                               .device = memory->second.device,
                               .writable = false,
                               .allocation = handle};
    return 0;
  });
}
Answer cuMemUnmap(Address address, size_t size) {
  return call_freeing("cuMemUnmap", [&] {
    const auto found = state().mapped.find(address);
    if (found == state().mapped.end() || found->second.end != address + size) return kInvalidValue;
    return free_range(state().mapped, address);
  });
}
Answer cuMemSetAccess(Address address, size_t size, const Access* access, size_t count) {
  return call("cuMemSetAccess", [&] {
    if (count != 1 || !has_device(access->location.id)) return kInvalidValue;
    for (const auto& [begin, range] : state().mapped) {
      if (range.meets(address, address + size) && !can_reach(access->location.id, range.device)) return kNotPermitted;
    }
    const bool writable = access->flags == kReadWrite;
    for (Address at = address; at < address + size;) {
      Range* range = find(at, Kind::mapped);
      if (range == nullptr) return kInvalidValue;
      range->writable = writable;
      at = range->end;
    }
    const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    return ::mprotect(reinterpret_cast<void*>(address), size, protection) == 0 ? 0 : kInvalidValue;
  });
}

// ---- for tests ----

// Device memory as cudaMalloc makes it.
Address fake_cuda_malloc(int device, uint64_t size) {
  const std::lock_guard lock(state().mutex);
  const Address begin = take_addresses(rounded(size, kPage), kPage);
  const int fd = make_memory(size);
  if (begin == 0 || !map_at(begin, size, fd, PROT_READ | PROT_WRITE)) std::abort();
  state().ranges[begin] = {.begin = begin, .end = begin + size, .device = device, .fd = fd, .serial = state().next++};
  return begin;
}
// What cannot be shared.
Address fake_cuda_pool(int device, uint64_t size) {
  const Address begin = fake_cuda_malloc(device, size);
  const std::lock_guard lock(state().mutex);
  state().ranges.at(begin).kind = Kind::pool;
  return begin;
}
// Chunks mapped one after another, as in torch's expandable segments. `chunk` is a multiple of 2 MiB.
Address fake_cuda_vmm(int device, uint64_t size, uint64_t chunk) {
  const Access access{.location = {.id = device}, .flags = kReadWrite};
  const AllocationKind kind{.location = {.id = device}};
  Address begin = 0;
  size = rounded(size, chunk);
  Answer failed = cuMemAddressReserve(&begin, size, 0, 0, 0);
  for (uint64_t offset = 0; offset < size && failed == 0; offset += chunk) {
    Allocation allocation = 0;
    failed = cuMemCreate(&allocation, chunk, &kind, 0);
    if (failed == 0) failed = cuMemMap(begin + offset, chunk, 0, allocation, 0);
    if (failed == 0) failed = cuMemRelease(allocation);
  }
  if (failed != 0 || cuMemSetAccess(begin, size, &access, 1) != 0) std::abort();
  return begin;
}
// What any of the three gave.
void fake_cuda_free(Address address) {
  const std::lock_guard lock(state().mutex);
  const Range range = state().ranges.at(address);
  for (auto at = state().mapped.lower_bound(range.begin); at != state().mapped.end() && at->first < range.end;)
    free_range(state().mapped, (at++)->first);
  free_range(state().ranges, address);
}
// As $FAKE_CUDA_FAIL, in place of what was before.
void fake_cuda_fail(const char* text) {
  const std::lock_guard lock(state().mutex);
  state().faults = parse_faults(text);
}
// "primaries", "registrations", "opened", ...; -1 for other names.
long fake_cuda_count(const char* name) {
  const std::lock_guard lock(state().mutex);
  const auto all = counts();
  const auto found = all.find(name);
  return found == all.end() ? -1 : found->second;
}

}  // extern "C"
