// What the system allows, and what that is worth.
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <fstream>

#include "base/bytes.h"
#include "base/text.h"
#include "doctor/doctor.h"
#include "memory/fresh_pages.h"
#include "storage/direct_reader.h"

namespace tensord::doctor {

using Verdict = Check::Verdict;

namespace {

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

// As the daemon's segments are given their pages.
std::string problem_of_huge_pages(memory::Segment segment) {
  memory::SegmentRun run;
  run.segments.push_back(std::move(segment));
  memory::FreshPages pages(run, memory::kHugePageBytes, memory::HugePages::wanted);
  pages.prepare(0, memory::kHugePageBytes);
  return pages.problem();
}

bool has_reserved_pages() {
  const base::Fd fd(::memfd_create("tensord-doctor", MFD_CLOEXEC | MFD_HUGETLB));
  void* const page = ::mmap(nullptr, memory::kHugePageBytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  return page != MAP_FAILED && ::munmap(page, memory::kHugePageBytes) == 0;
}

}  // namespace

std::vector<Check> look_around() {
  const auto ring = storage::start_uring_reader();
  auto segment = memory::make_segment(memory::kHugePageBytes, ::getuid());
  const std::string no_memory = segment ? "" : segment.error().message;
  const std::string not_huge = segment ? problem_of_huge_pages(std::move(*segment)) : no_memory;
  const bool reserved = has_reserved_pages();
  const uint64_t locked = limit_of(RLIMIT_MEMLOCK), files = limit_of(RLIMIT_NOFILE);
  struct statvfs shm = {};
  ::statvfs("/dev/shm", &shm);
  return {
      try_out("io_uring", ring ? "" : ring.error().message,
              "threads read; allow it in kernel.io_uring_disabled and seccomp (io_uring_setup, _enter, "
              "_register)"),
      try_out("memfd and its seals", no_memory, "nothing can be shared: allow memfd_create"),
      try_out("huge pages, MADV_COLLAPSE", not_huge, "needs Linux 6.1 with huge pages"),
      check("huge pages, MFD_HUGETLB", reserved ? "works" : "none reserved", reserved || not_huge.empty(),
            "vm.nr_hugepages reserves some"),
      check("RLIMIT_MEMLOCK", limit_text(locked), locked >= 64 * base::kMiB,
            "LimitMEMLOCK=infinity, for memory that GPUs copy from"),
      check("RLIMIT_NOFILE", files == UINT64_MAX ? "no limit" : base::text(files), files >= 16384,
            "LimitNOFILE=65536: a large model takes 1400"),
      check("cgroup memory.max", limit_text(cgroup_memory_limit()), true, ""),
      check("seccomp", is_filtered() ? "a filter" : "none", true, ""),
      check("/dev/shm", base::human_bytes(shm.f_blocks * shm.f_frsize), true, ""),
  };
}

}  // namespace tensord::doctor
