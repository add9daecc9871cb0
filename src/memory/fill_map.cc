#include "memory/fill_map.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "base/bytes.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/text.h"

namespace tensord::memory {

using base::Code;
using base::fail;

namespace {
constexpr uint64_t kHeaderBytes = 4096;
constexpr int64_t kAliveCheckMs = 100;

std::atomic<uint64_t>* bit_words(std::byte* data) {
  return reinterpret_cast<std::atomic<uint64_t>*>(data + kHeaderBytes);
}

uint64_t map_bytes(uint64_t block_count) {
  return base::align_up(kHeaderBytes + (block_count + 63) / 64 * sizeof(uint64_t), kHeaderBytes);
}

// The word lives in shared memory, so the process-private operations do not apply.
void futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout) {
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}
}  // namespace

Result<FillMap> FillMap::create(uint64_t block_count, uint64_t total_bytes) {
  FillMap map;
  TRY_ASSIGN(SharedMemory memory, make_shared_memory("tensord-fill", map_bytes(block_count), kHeaderBytes));
  map.fd_ = std::move(memory.fd);
  map.mapped_ = std::move(memory.mapped);
  FillHeader& header = map.header();
  header.magic = FillHeader::kMagic;
  header.total_bytes = total_bytes;
  header.block_count = block_count;
  return map;
}

void FillMap::mark_block(uint64_t block, uint64_t size_bytes) {
  CHECK(block < header().block_count);
  header().ready_bytes.fetch_add(size_bytes, std::memory_order_relaxed);
  bit_words(mapped_.data())[block / 64].fetch_or(uint64_t{1} << (block % 64), std::memory_order_release);
  wake();
}

void FillMap::end_ready(const tensor::Digest& artifact_id) {
  std::copy(artifact_id.bytes.begin(), artifact_id.bytes.end(), header().artifact_id);
  end(FillState::ready);
}

void FillMap::end_failed(const base::Error& error) {
  if (state() != FillState::filling) return;
  header().error_code = static_cast<uint32_t>(error.code);
  const size_t size = std::min(error.message.size(), sizeof(FillHeader::error_message) - 1);
  std::memcpy(header().error_message, error.message.data(), size);
  header().error_message[size] = '\0';
  end(FillState::failed);
}

void FillMap::void_it() { end(FillState::failed); }

void FillMap::end(FillState state) {
  header().state.store(static_cast<uint32_t>(state), std::memory_order_release);
  wake();
}

void FillMap::wake() {
  header().sequence.fetch_add(1, std::memory_order_release);
  futex(header().sequence, FUTEX_WAKE, INT_MAX, nullptr);
}

Result<FillView> FillView::open(const base::Fd& fd) {
  FillView view;
  TRY_ASSIGN(view.mapped_, map_shared_memory(fd, "the daemon's fill map"));
  const uint64_t size_bytes = view.mapped_.size_bytes();
  if (size_bytes < kHeaderBytes || view.header().magic != FillHeader::kMagic || view.block_count() > size_bytes * 8 ||
      map_bytes(view.block_count()) != size_bytes) {
    return fail(Code::corrupt, "the daemon's fill map has a header that makes no sense");
  }
  return view;
}

tensor::Digest FillView::artifact_id() const {
  tensor::Digest id;
  if (state() == FillState::ready) std::copy_n(header().artifact_id, id.bytes.size(), id.bytes.begin());
  return id;
}

base::Error FillView::error() const {
  const char* message = header().error_message;
  return base::Error{base::code_from(header().error_code),
                     std::string(message, ::strnlen(message, sizeof(FillHeader::error_message)))};
}

bool FillView::has_blocks(uint64_t first, uint64_t last) const {
  if (state() == FillState::ready) return true;
  const auto* words = bit_words(mapped_.data());
  for (uint64_t block = first; block < last; ++block) {
    if ((words[block / 64].load(std::memory_order_acquire) >> (block % 64) & 1) == 0) return false;
  }
  return true;
}

Status FillView::wait(uint64_t first, uint64_t last, int64_t timeout_ms, const std::function<Status()>& go_on) const {
  CHECK(first <= last && last <= block_count());
  return wait_until([&] { return has_blocks(first, last); }, timeout_ms, go_on);
}

Status FillView::wait_ready(int64_t timeout_ms, const std::function<Status()>& go_on) const {
  return wait_until([&] { return state() == FillState::ready; }, timeout_ms, go_on);
}

Status FillView::wait_until(const std::function<bool()>& reached, int64_t timeout_ms,
                            const std::function<Status()>& go_on) const {
  const int64_t begin_ns = base::monotonic_ns();
  for (;;) {
    const uint32_t sequence = header().sequence.load(std::memory_order_acquire);
    if (state() == FillState::failed) return tl::unexpected(error());
    if (reached()) return {};
    int64_t nap_ms = kAliveCheckMs;
    if (timeout_ms >= 0) {
      const int64_t left_ms = timeout_ms - (base::monotonic_ns() - begin_ns) / 1'000'000;
      if (left_ms <= 0) {
        return fail(Code::unavailable, "waited ", timeout_ms, " ms for bytes that are still being read (",
                    base::human_bytes(ready_bytes()), " of ", base::human_bytes(total_bytes()), " are there)");
      }
      nap_ms = std::min(nap_ms, left_ms);
    }
    const timespec nap{0, nap_ms * base::kNsPerMs};  // below a second
    futex(header().sequence, FUTEX_WAIT, sequence, &nap);
    if (!reached() && state() == FillState::filling) TRY(go_on());
  }
}

}  // namespace tensord::memory
