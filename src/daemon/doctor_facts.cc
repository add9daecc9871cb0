// What the system allows, and what that is worth.
#include <fcntl.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "base/bytes.h"
#include "base/fd.h"
#include "base/text.h"
#include "daemon/config.h"
#include "daemon/doctor.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

namespace tensord::daemon {

using base::human_bytes;
using base::text;
using Grade = Verdict::Grade;

namespace {

template <typename Number>
Number number_in(const char* path, Number otherwise) {
  Number number = otherwise;
  return std::ifstream(path) >> number ? number : otherwise;
}

// The number behind "name:" in a file of such lines.
uint64_t field_in(const char* path, std::string_view name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name)) return std::strtoull(line.c_str() + name.size(), nullptr, 10);
  }
  return 0;
}

std::string bracketed(const char* path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  const size_t begin = line.find('['), end = line.find(']');
  return begin < end && end != std::string::npos ? line.substr(begin + 1, end - begin - 1) : "";
}

uint64_t limit_of(__rlimit_resource resource) {
  rlimit limit;
  return ::getrlimit(resource, &limit) != 0 || limit.rlim_max == RLIM_INFINITY ? UINT64_MAX : limit.rlim_max;
}

uint64_t free_in(const char* folder, bool whole) {
  struct statvfs space;
  if (::statvfs(folder, &space) != 0) return 0;
  return (whole ? space.f_blocks : space.f_bavail) * space.f_frsize;
}

// A sealed memfd as segments are, with huge pages.
void try_memfd(SystemFacts& facts) {
  constexpr uint64_t kHugeBytes = 2 << 20;
  const base::Fd fd(::memfd_create("tensord-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid() || ::ftruncate(fd.get(), kHugeBytes) != 0) return void(facts.memfd_error = errno);
  void* const range = ::mmap(nullptr, 2 * kHugeBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (range == MAP_FAILED) return void(facts.memfd_error = errno);
  auto* const data = reinterpret_cast<char*>(base::align_up(reinterpret_cast<uint64_t>(range), kHugeBytes));
  if (::mmap(data, kHugeBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd.get(), 0) == MAP_FAILED ||
      ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE) != 0) {
    facts.memfd_error = errno;
  } else {
    *data = 1;
    if (::madvise(data, kHugeBytes, MADV_COLLAPSE) != 0) facts.collapse_error = errno;
  }
  uint64_t range_of_bytes[2] = {0, 0}, counts[5];
  if (::syscall(SYS_cachestat, fd.get(), range_of_bytes, counts, 0) != 0) facts.cachestat_error = errno;
  ::munmap(range, 2 * kHugeBytes);
}

uint64_t direct_align_of(const std::string& folder) {
  const base::Fd fd(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600));
  if (!fd.valid()) return 0;
  for (const uint64_t align : {512, 4096}) {
    alignas(4096) static char sector[4096];
    if (::pwrite(fd.get(), sector, align, static_cast<off_t>(align)) == static_cast<ssize_t>(align))
      return align;
  }
  return 0;
}

std::string limit_text(uint64_t bytes) { return bytes == UINT64_MAX ? "no limit" : human_bytes(bytes); }
std::string works(int error) { return error == 0 ? "works" : std::strerror(error); }

Verdict io_uring_verdict(const SystemFacts& facts) {
  if (facts.io_uring_error == 0) return {"io_uring", "works"};
  const char* why =
      facts.io_uring_disabled > 0      ? "set kernel.io_uring_disabled to 0"
      : facts.io_uring_error == ENOSYS ? "the kernel, or a seccomp filter, has none; pread is used"
      : facts.seccomp_mode == 2 ? "a seccomp filter forbids it: allow io_uring_setup, io_uring_enter and "
                                  "io_uring_register; pread is used"
                                : "pread is used";
  return {"io_uring", works(facts.io_uring_error), Grade::missing, why};
}

Verdict rate_verdict(const NamedRate& named, const MachineRates& rates) {
  constexpr double kGB = 1e9;
  const double rate = rates.*named.rate;
  char shown[32];
  std::snprintf(shown, sizeof shown, "%.2f GB/s", rate / kGB);
  Verdict verdict{named.meaning, shown};
  const auto better = [&](bool could, const char* advice) {
    if (could) verdict.grade = Grade::could_be_better, verdict.advice = advice;
  };
  const std::string_view name = named.name;
  if (rate == 0) {
    verdict.grade = Grade::missing;
    verdict.value = "-";
    verdict.advice = name == "cache_stream" ? "this CPU has no AVX-512; pread is used"
                     : name == "fresh_huge"
                         ? "set /sys/kernel/mm/transparent_hugepage/shmem_enabled to advise"
                     : name == "disk_direct" ? "the file system refuses O_DIRECT: keep weights on ext4 or xfs"
                                             : "name a folder or a file on a disk (--folder, --file)";
  }
  if (name == "memcpy_all")
    better(rate < 1.3 * rates.memcpy_1, "the cores share one memory channel, or others use them");
  if (name == "fresh_4k")
    better(rate < 0.5 * rates.memcpy_all, "`prefault` touches memory before loads need it");
  if (name == "disk_direct") better(rate > 0 && rate < 1 * kGB, "an NVMe disk reads 3 GB/s and more");
  if (name == "hash_1") better(rate < 8 * kGB, "hashing is slow here: more read_threads");
  return verdict;
}

}  // namespace

const char* grade_name(Grade grade) {
  static constexpr const char* kNames[] = {"good", "could be better", "missing"};
  return kNames[static_cast<size_t>(grade)];
}

SystemFacts gather_facts(const std::string& folder) {
  SystemFacts facts;
  io_uring_params params = {};
  const base::Fd ring(static_cast<int>(::syscall(SYS_io_uring_setup, 4, &params)));
  facts.io_uring_error = ring.valid() ? 0 : errno;
  facts.io_uring_disabled = number_in("/proc/sys/kernel/io_uring_disabled", -1);
  facts.seccomp_mode = static_cast<int>(field_in("/proc/self/status", "Seccomp:"));
  facts.shmem_huge = bracketed("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  facts.huge_pages_extra = number_in<uint64_t>("/proc/sys/vm/nr_overcommit_hugepages", 0);
  try_memfd(facts);
  facts.locked_bytes_max = limit_of(RLIMIT_MEMLOCK);
  facts.descriptor_count_max = limit_of(RLIMIT_NOFILE);
  facts.memory_max = cgroup_memory("memory.max");
  facts.memory_high = cgroup_memory("memory.high");
  facts.memory_available = field_in("/proc/meminfo", "MemAvailable:") * base::kKiB;
  facts.overcommit_memory = number_in("/proc/sys/vm/overcommit_memory", 0);
  facts.shm_bytes = free_in("/dev/shm", true);
  facts.direct_align = direct_align_of(folder);
  facts.free_bytes = free_in(folder.c_str(), false);
  return facts;
}

std::vector<Verdict> verdicts_of(const SystemFacts& facts, const MachineRates& rates) {
  std::vector<Verdict> lines;
  for (const NamedRate& named : named_rates()) lines.push_back(rate_verdict(named, rates));
  const auto add = [&](std::string name, std::string value, bool good, Grade otherwise, const char* advice) {
    lines.push_back({std::move(name), std::move(value), good ? Grade::good : otherwise, good ? "" : advice});
  };
  constexpr auto kBetter = Grade::could_be_better, kMissing = Grade::missing;
  lines.push_back(io_uring_verdict(facts));
  add("huge pages, MADV_COLLAPSE", works(facts.collapse_error), facts.collapse_error == 0, kMissing,
      "set shmem_enabled to advise, or vm.nr_overcommit_hugepages");
  add("huge pages, shmem_enabled", facts.shmem_huge.empty() ? "-" : facts.shmem_huge,
      facts.collapse_error == 0 || facts.shmem_huge == "always" || facts.shmem_huge == "advise", kBetter,
      "write advise to /sys/kernel/mm/transparent_hugepage/shmem_enabled");
  add("huge pages, overcommitted", text(facts.huge_pages_extra), true, kBetter, "");
  add("memfd and its seals", works(facts.memfd_error), facts.memfd_error == 0, kMissing,
      "tensord cannot share memory without them: allow memfd_create");
  add("cachestat", works(facts.cachestat_error), facts.cachestat_error == 0, kBetter,
      "Linux 6.5 and newer have it; the page cache is asked page by page");
  add("RLIMIT_MEMLOCK", limit_text(facts.locked_bytes_max), facts.locked_bytes_max >= 64 * base::kMiB,
      kBetter, "raise it (LimitMEMLOCK=infinity) for buffers registered with io_uring");
  add("RLIMIT_NOFILE",
      facts.descriptor_count_max == UINT64_MAX ? "no limit" : text(facts.descriptor_count_max),
      facts.descriptor_count_max >= 16384, kBetter, "raise it (LimitNOFILE=65536): a large model takes 1400");
  add("cgroup memory.max", limit_text(facts.memory_max), true, kBetter, "");
  add("cgroup memory.high", limit_text(facts.memory_high), facts.memory_high >= facts.memory_max, kBetter,
      "below memory.max it slows loads down: raise it, or keep host_memory below it");
  add("memory available", human_bytes(facts.memory_available), facts.memory_available > base::kGiB, kBetter,
      "other programs hold most of it");
  add("seccomp", facts.seccomp_mode == 2 ? "a filter" : "none", true, kBetter, "");
  add("vm.overcommit_memory", text(facts.overcommit_memory), facts.overcommit_memory != 2, kBetter,
      "strict: clients get tensors that cannot be written to");
  add("/dev/shm", human_bytes(facts.shm_bytes), true, kBetter, "");
  add("O_DIRECT", facts.direct_align == 0 ? "refused" : text("sectors of ", facts.direct_align),
      facts.direct_align > 0, kMissing, "keep weights on ext4 or xfs");
  add("free space", human_bytes(facts.free_bytes), facts.free_bytes > base::kGiB, kBetter, "nearly full");
  return lines;
}

}  // namespace tensord::daemon
