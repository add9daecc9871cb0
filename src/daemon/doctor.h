// `tensord doctor`: measures this machine, says what could be better, and keeps the rates in STATE/machine.json.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "daemon/machine.h"

namespace tensord::daemon {

// `argv[0]` is the verb. Returns the exit status (docs/OPERATING.md lists them).
int doctor_main(int argc, char** argv);

// What the system allows. Every failure is an errno, 0 where it works.
struct SystemFacts {
  int io_uring_error = 0;
  int io_uring_disabled = -1;  // kernel.io_uring_disabled; -1 where the kernel has no such switch
  int seccomp_mode = 0;        // 2: a filter
  std::string shmem_huge;      // the word in brackets of shmem_enabled
  uint64_t huge_pages_extra = 0;
  int collapse_error = 0;
  int memfd_error = 0;  // memfd_create, and sealing it
  int cachestat_error = 0;
  uint64_t locked_bytes_max = 0;  // UINT64_MAX: no limit, as in all that follow
  uint64_t descriptor_count_max = 0;
  uint64_t memory_max = UINT64_MAX;
  uint64_t memory_high = UINT64_MAX;
  uint64_t memory_available = 0;
  int overcommit_memory = 0;
  uint64_t shm_bytes = 0;     // of /dev/shm
  uint64_t direct_align = 0;  // what O_DIRECT wants of offsets; 0: the file system has none
  uint64_t free_bytes = 0;    // in the folder
};
// `folder` is where the disk is looked at.
SystemFacts gather_facts(const std::string& folder);

struct Verdict {
  enum class Grade : uint8_t { good, could_be_better, missing };
  std::string name;
  std::string value;
  Grade grade = Grade::good;
  std::string advice;  // what to do, unless it is good
};
const char* grade_name(Verdict::Grade grade);
// Pure.
std::vector<Verdict> verdicts_of(const SystemFacts& facts, const MachineRates& rates);

struct MeasureOptions {
  std::string folder;                       // a scratch file without a name is made here
  std::string file;                         // not empty: this one is read instead
  bool quick = false;                       // less of everything, once
  uint64_t memory_bytes = 0;                // that may be used
  std::function<void(double)> on_progress;  // share 0 to 1
};
struct Measured {
  MachineRates rates;
  std::vector<std::string> notes;  // what was not measured, and why
};
// The median of several short runs of each, in turn. Code::exhausted when not even the least memory can be had.
base::Result<Measured> measure(const MeasureOptions& options);

}  // namespace tensord::daemon
