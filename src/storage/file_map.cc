#include "storage/file_map.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <utility>

#include "base/bytes.h"

namespace tensord::storage {

namespace {

// The pages that this thread reads. The handler runs on the thread that read.
struct Guard {
  uintptr_t begin = 0, end = 0;  // empty: none
  bool lost = false;
};
thread_local Guard guard;

uint64_t page_bytes() { return static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)); }

struct sigaction previous_action;

// Puts zeros where the file has no pages any more, so that the read goes on and its end finds `lost`.
void on_bus_error(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (address >= guard.begin && address < guard.end) {
    const int saved_errno = errno;
    const uintptr_t page = address / page_bytes() * page_bytes();
    void* const zeros = ::mmap(reinterpret_cast<void*>(page), guard.end - page, PROT_READ,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    errno = saved_errno;
    guard.lost = true;
    if (zeros != MAP_FAILED) return;
  }
  if ((previous_action.sa_flags & SA_SIGINFO) != 0) return previous_action.sa_sigaction(signal, info, context);
  ::sigaction(SIGBUS, &previous_action, nullptr);  // the instruction that faulted runs again, and ends the process
}

void catch_bus_errors() {
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGBUS, &action, &previous_action);
}

}  // namespace

FileMap::FileMap(int fd, uint64_t size_bytes) : size_bytes_(size_bytes) {
  static std::once_flag once;
  std::call_once(once, catch_bus_errors);
  void* const data = ::mmap(nullptr, size_bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (data != MAP_FAILED) data_ = static_cast<std::byte*>(data);
}

FileMap::~FileMap() {
  if (data_ != nullptr) ::munmap(data_, size_bytes_);
}

bool FileMap::read_range(uint64_t offset, uint64_t size_bytes,
                         const std::function<void(std::span<const std::byte> bytes)>& read) const {
  const uint64_t begin = offset / page_bytes() * page_bytes();
  const uint64_t end = base::align_up(offset + size_bytes, page_bytes());
  std::byte* const pages = data_ + begin;
#ifdef MADV_POPULATE_READ
  // One call instead of a fault for every few pages. EINVAL: a kernel before 5.14.
  if (::madvise(pages, end - begin, MADV_POPULATE_READ) != 0 && errno != EINVAL) return false;
#endif
  const auto address = reinterpret_cast<uintptr_t>(pages);
  guard = {address, address + (end - begin), false};
  read({data_ + offset, size_bytes});
  const bool lost = std::exchange(guard, {}).lost;
  ::madvise(pages, end - begin, MADV_DONTNEED);
  return !lost;
}

}  // namespace tensord::storage
