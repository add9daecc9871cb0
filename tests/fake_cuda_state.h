// What the GPU driver of fake_cuda.cc keeps.
#pragma once

#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "gpu/driver.h"

namespace tensord::gpu {

constexpr Answer kInvalidDevice = 101, kInvalidPrimary = 201, kInvalidHandle = 400, kIllegalAddress = 700,
                 kRegistered = 712, kNotRegistered = 713;
constexpr uint64_t kPage = 4096, kGranularity = 2 << 20, kArenaBytes = uint64_t{1} << 38;
constexpr int kDevicesMax = 8;

enum class Kind { plain, pool, ipc, reserved, mapped, host };
struct Range {
  Kind kind = Kind::plain;
  Address begin = 0, end = 0;
  int device = 0;
  int owner = -1;  // the device whose primary it goes with
  int fd = -1;
  bool writable = true;
  uint64_t serial = 0;
  int opened_count = 1;
  Allocation allocation = 0;
  bool meets(Address other_begin, Address other_end) const { return begin < other_end && other_begin < end; }
};
struct Memory {
  int fd = -1, device = 0, use_count = 1;
  uint64_t size_bytes = 0;
};
struct Copy {
  Address target = 0, source = 0;
  size_t row_bytes = 0, row_count = 1, target_pitch = 0, source_pitch = 0;
  Address target_end() const { return target + (row_count - 1) * target_pitch + row_bytes; }
  Address source_end() const { return source + (row_count - 1) * source_pitch + row_bytes; }
};
struct Stream {
  int owner = 0;
  uint64_t done_count = 0;
  std::deque<Copy> waiting;
};
struct Event {
  int owner = 0;
  Stream* stream = nullptr;
  uint64_t behind = 0;  // so many copies of the stream
};
struct Fault {
  Answer answer = 0;
  int from = 1, call_count = 0;
};
struct Shared {  // the content of an IpcHandle
  char magic[8] = "fakecud";
  int process = 0, fd = 0, device = 0, unused = 0;
  uint64_t size_bytes = 0, serial = 0, rest[3] = {};
};

struct State {
  std::mutex mutex;
  // By their beginnings; mapped: what lies in reserved ranges.
  std::map<Address, Range> ranges, mapped, hosts;
  std::map<Allocation, Memory> allocations;
  std::list<Stream> streams;
  std::list<Event> events;
  int primaries[kDevicesMax] = {};  // how often each is retained
  std::map<std::string, Fault> faults;
  Address arena = 0;
  uint64_t next = 1;  // serial
  long stray_count = 0, lost_count = 0;
  explicit State(std::map<std::string, Fault> planned) : faults(std::move(planned)) {}
};

}  // namespace tensord::gpu
