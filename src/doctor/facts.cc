// What the system allows, and what that is worth.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "base/bytes.h"
#include "base/text.h"
#include "doctor/doctor.h"
#include "memory/fresh_pages.h"
#include "storage/direct_reader.h"

namespace tensord::doctor {

using Verdict = Check::Verdict;

namespace {

std::string first_line(const char* path) {
  std::string line = "-";
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

std::string limit_text(uint64_t bytes) { return bytes == UINT64_MAX ? "no limit" : base::human_bytes(bytes); }

uint64_t limit_of(__rlimit_resource resource) {
  rlimit limit;
  return ::getrlimit(resource, &limit) != 0 || limit.rlim_max == RLIM_INFINITY ? UINT64_MAX : limit.rlim_max;
}

Check check(const char* name, std::string value, bool good, const char* advice) {
  return {name, std::move(value), good ? Verdict::good : Verdict::could_be_better, good ? "" : advice};
}

// An empty problem: it works.
Check try_out(const char* name, const std::string& problem, const char* advice) {
  if (problem.empty()) return {name, "works"};
  return {name, problem, Verdict::missing, advice};
}

bool is_filtered() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("Seccomp:")) return line.ends_with("2");
  }
  return false;
}

Check try_io_uring() {
  const auto ring = storage::start_uring_reader();
  const std::string disabled = first_line("/proc/sys/kernel/io_uring_disabled");
  return try_out("io_uring", ring ? "" : ring.error().message,
                 disabled > "0"  ? "threads read; set kernel.io_uring_disabled to 0"
                 : is_filtered() ? "threads read; let seccomp allow io_uring_setup, _enter and _register"
                                 : "threads read");
}

// As the daemon's segments are made and given their pages.
void try_memory(std::vector<Check>& checks) {
  auto segment = memory::make_segment(memory::kHugePageBytes, ::getuid());
  std::string problem = segment ? "" : segment.error().message;
  checks.push_back(try_out("memfd and its seals", problem, "nothing can be shared: allow memfd_create"));
  if (segment) {
    memory::SegmentRun run;
    run.segments.push_back(std::move(*segment));
    memory::FreshPages pages(run, memory::kHugePageBytes, memory::HugePages::wanted);
    pages.prepare(0, memory::kHugePageBytes);
    problem = pages.problem();
  }
  const bool collapses = problem.empty();
  checks.push_back(try_out("huge pages, MADV_COLLAPSE", problem, "needs Linux 6.1 with huge pages"));
  const base::Fd fd(::memfd_create("tensord-doctor", MFD_CLOEXEC | MFD_HUGETLB));
  void* const page = ::mmap(nullptr, memory::kHugePageBytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  const bool reserved = page != MAP_FAILED && ::munmap(page, memory::kHugePageBytes) == 0;
  checks.push_back(check("huge pages, MFD_HUGETLB", reserved ? "works" : "none reserved",
                         reserved || collapses, "vm.nr_hugepages reserves some"));
  const std::string shmem = first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  const size_t chosen = shmem.find('[') + 1;
  checks.push_back(check("huge pages, shmem_enabled", shmem.substr(chosen, shmem.find(']') - chosen),
                         collapses, "write advise to transparent_hugepage/shmem_enabled"));
}

}  // namespace

std::vector<Check> look_around() {
  std::vector<Check> checks = {try_io_uring()};
  try_memory(checks);
  const uint64_t locked = limit_of(RLIMIT_MEMLOCK), files = limit_of(RLIMIT_NOFILE);
  const uint64_t most = cgroup_memory("memory.max"), high = cgroup_memory("memory.high");
  const std::string overcommit = first_line("/proc/sys/vm/overcommit_memory");
  struct statvfs shm = {};
  ::statvfs("/dev/shm", &shm);
  const Check rest[] = {
      check("RLIMIT_MEMLOCK", limit_text(locked), locked >= 64 * base::kMiB,
            "LimitMEMLOCK=infinity, for memory that GPUs copy from"),
      check("RLIMIT_NOFILE", files == UINT64_MAX ? "no limit" : base::text(files), files >= 16384,
            "LimitNOFILE=65536: a large model takes 1400"),
      check("cgroup memory.max", limit_text(most), true, ""),
      check("cgroup memory.high", limit_text(high), high >= most, "slows loads down: keep host_memory below"),
      check("seccomp", is_filtered() ? "a filter" : "none", true, ""),
      check("vm.overcommit_memory", overcommit, overcommit != "2", "strict: tensors cannot be written to"),
      check("/dev/shm", base::human_bytes(shm.f_blocks * shm.f_frsize), true, ""),
  };
  checks.insert(checks.end(), std::begin(rest), std::end(rest));
  return checks;
}

}  // namespace tensord::doctor
