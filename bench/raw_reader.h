// What loads are raced against: files read by hand into memory that was touched before.
#pragma once

#include <string>
#include <vector>

#include "bench/measure.h"
#include "memory/fill_map.h"

struct io_uring;

namespace tensord::bench {

// Takes the file out of the page cache and looks whether it is gone. Code::unsupported where it stays (tmpfs, or
// somebody maps it).
Status drop_cache(const std::string& path);

// A memfd as the daemon's segments are, touched.
enum class Pages { small, huge };
// Huge: by MADV_COLLAPSE, Code::unsupported where the kernel has none to give.
Result<memory::Mapped> make_shared(uint64_t size_bytes, Pages pages);

// From the page cache, by `thread_count` threads, into memory of at most `memory_bytes`, used again and again.
class HotReader {
 public:
  static Result<HotReader> make(const std::string& path, int thread_count, uint64_t memory_bytes);
  // By pread in several piece sizes, by pread into a small buffer and streaming stores, and out of a mapping made in
  // the act. Of this object, which must stay where it is.
  std::vector<Contender> ways() const;
  // By the small buffer; `hash`: every 4 KiB of it before it is streamed.
  enum class Hash { no, each_page };
  Result<Sample> read_bounced(Hash hash) const;
  uint64_t size_bytes() const { return size_bytes_; }

 private:
  enum class By { memcpy, stream };
  Result<Sample> read_straight(uint64_t piece_bytes) const;
  Result<Sample> read_mapping(By by) const;
  // `read(offset in the file, size, target)` for every piece.
  template <typename Read>
  Sample each_piece(uint64_t piece_bytes, const Read& read) const;

  base::Fd file_;
  std::string path_;
  memory::Mapped memory_;
  uint64_t size_bytes_ = 0;
  int thread_count_ = 1;
};

// From the disk past the page cache (O_DIRECT), with `depth` reads of `block_bytes` under way.
struct DirectWay {
  enum class Engine { pread, uring } engine = Engine::pread;
  uint64_t block_bytes = 0;
  int depth = 0;
  Pages pages = Pages::small;
  std::string text() const;
};

class DirectReader {
 public:
  static Result<std::unique_ptr<DirectReader>> make(const std::string& path);
  DirectReader(DirectReader&&) = delete;
  ~DirectReader();

  // The fastest ways by which the first part of the file was read, all of 1, 4, 16 MiB, 2 to 32 under way, both page
  // sizes and both engines tried, as acts that read the whole file. Of this object.
  Result<std::vector<Contender>> fastest_ways(const Options& options, size_t count) const;

  // The first bytes of the file; the cache is dropped before, outside the clock.
  Result<Sample> read(const DirectWay& way, uint64_t size_bytes) const;
  uint64_t size_bytes() const { return size_bytes_; }
  const memory::Mapped& memory() const { return memory_[0]; }

 private:
  DirectReader() = default;
  Result<Sample> read_by_uring(const DirectWay& way, uint64_t size_bytes) const;
  Result<Sample> read_by_threads(const DirectWay& way, uint64_t size_bytes) const;
  Status open_ring(size_t pages);

  std::string path_;
  base::Fd file_;
  uint64_t size_bytes_ = 0;
  memory::Mapped memory_[2];            // by Pages; huge may be missing
  std::unique_ptr<io_uring> rings_[2];  // with that memory registered; missing where the kernel says no
};

}  // namespace tensord::bench
