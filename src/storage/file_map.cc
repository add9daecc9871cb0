#include "storage/file_map.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>

namespace tensord::storage {

namespace {

// The pages that this thread reads. The handler runs on the thread that read.
struct Guard {
  uintptr_t begin = 0, end = 0;  // empty: none
  bool lost = false;
};
thread_local Guard guard;

struct sigaction previous_action;

// Puts zeros where the file has no pages any more, so that the read goes on and its end finds `lost`.
void on_bus_error(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (address >= guard.begin && address < guard.end) {
    const int saved_errno = errno;
    const uintptr_t page = address & ~(static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE)) - 1);
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

std::span<std::byte> whole_pages(std::span<const std::byte> bytes) {
  const auto mask = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE)) - 1;
  const auto begin = reinterpret_cast<uintptr_t>(bytes.data());
  const uintptr_t end = (begin + bytes.size() + mask) & ~mask;
  return {reinterpret_cast<std::byte*>(begin & ~mask), end - (begin & ~mask)};
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

bool FileMap::enter(std::span<const std::byte> bytes) {
  const std::span<std::byte> pages = whole_pages(bytes);
#ifdef MADV_POPULATE_READ
  // One call instead of a fault for every few pages. EINVAL: a kernel before 5.14.
  if (::madvise(pages.data(), pages.size(), MADV_POPULATE_READ) != 0 && errno != EINVAL) return false;
#endif
  const auto begin = reinterpret_cast<uintptr_t>(pages.data());
  guard = {begin, begin + pages.size(), false};
  return true;
}

bool FileMap::leave(std::span<const std::byte> bytes) {
  const bool lost = std::exchange(guard, {}).lost;
  const std::span<std::byte> pages = whole_pages(bytes);
  ::madvise(pages.data(), pages.size(), MADV_DONTNEED);
  return !lost;
}

}  // namespace tensord::storage
