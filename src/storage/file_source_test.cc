#include "storage/file_source.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <latch>
#include <random>
#include <thread>

#include "base/bytes.h"
#include "base/text.h"
#include "storage/residency.h"
#include "storage/source_testing.h"

namespace tensord::storage {
namespace {

using base::Code;
using base::kGiB;
using Bytes = std::vector<std::byte>;

SourceFile open_file(const std::string& path, int flags = O_RDONLY) {
  base::Fd fd(::open(path.c_str(), flags | O_CLOEXEC));
  const auto identity = base::identify_file(fd.get(), path).value();
  return {std::move(fd), path, identity};
}

// Resident bytes of mappings of files of this name, as /proc/self/smaps counts them.
uint64_t mapped_file_bytes(const std::string& name) {
  std::ifstream smaps("/proc/self/smaps");
  uint64_t kib = 0, total_kib = 0;
  bool ours = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.find('-') < line.find(' ')) ours = line.ends_with("/" + name);  // the head of a mapping
    if (ours && std::sscanf(line.c_str(), "Rss: %" SCNu64, &kib) == 1) total_kib += kib;
  }
  return total_kib << 10;
}

class FileSource : public testing::Test {
 protected:
  std::unique_ptr<Source> make(SourceFile file, PreadFunction pread = ::pread, CachedPath path = CachedPath::plain) {
    std::vector<SourceFile> files;
    files.push_back(std::move(file));
    return make_file_source(std::move(files), *pool_, {.cached_path = path, .pread = std::move(pread)});
  }

  // Over `bytes` written to a file, read by `pread`.
  std::unique_ptr<Source> make(const Bytes& bytes, PreadFunction pread) {
    path_ = folder_.write("model", bytes);
    return make(open_file(path_), std::move(pread));
  }

  // "code: message" of a read that must fail, the folder left out.
  std::string failure(Source& source, uint64_t offset, std::span<std::byte> target) {
    const Status status = read_now(source, 0, offset, target);
    if (status) return "it succeeded";
    std::string message = status.error().message;
    if (const size_t at = message.find(path_); at != std::string::npos) message.replace(at, path_.size(), "model");
    return base::text(base::code_name(status.error().code), ": ", message);
  }

  ScratchFolder folder_;
  std::string path_;
  std::unique_ptr<ReadPool> pool_ = start_read_pool(1).value();
};

TEST_F(FileSource, interrupted_and_short_reads_are_carried_on) {
  int call_count = 0;
  const Bytes bytes = sample_bytes(1000);
  auto source = make(bytes, [&](int fd, void* target, size_t size_bytes, off_t offset) -> ssize_t {
    if (++call_count % 2 == 1) {
      errno = EINTR;
      return -1;
    }
    return ::pread(fd, target, std::max<size_t>(size_bytes / 2, 1), offset);
  });
  Bytes read(1000);
  EXPECT_TRUE(read_now(*source, 0, 0, read));
  EXPECT_EQ(read, bytes);
  EXPECT_EQ(source->counters().read_count, 1u);
}

TEST_F(FileSource, a_mapped_file_that_is_cut_while_its_pages_are_read_is_an_error_and_no_signal) {
  if (!base::can_stream()) GTEST_SKIP() << "this CPU has neither AVX512F nor AVX2";
  const Bytes bytes = sample_bytes(1 << 20);
  path_ = folder_.write("model", bytes);
  auto source = make(open_file(path_), ::pread, CachedPath::mapped);
  Bytes read(bytes.size());
  Status status;
  std::latch done(1);
  source->read({.target = read,
                .done =
                    [&](Status ended, ReadTiming) {
                      status = std::move(ended);
                      done.count_down();
                    },
                .piece =
                    [&](uint64_t at, std::span<const std::byte>) {
                      if (at == 256 << 10) {
                        EXPECT_EQ(::truncate(path_.c_str(), 4096), 0);
                      }
                    }});
  done.wait();
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code, Code::changed) << status.error().message;
  EXPECT_TRUE(std::equal(read.begin(), read.begin() + (256 << 10), bytes.begin()));
  // Another file on the same thread is none the wiser.
  const std::string other = folder_.write("other", bytes);
  EXPECT_TRUE(read_now(*make(open_file(other), ::pread, CachedPath::mapped), 0, 0, read));
  EXPECT_EQ(read, bytes);
}

TEST_F(FileSource, pages_of_a_mapped_file_are_given_back) {
  if (!base::can_stream()) GTEST_SKIP() << "this CPU has neither AVX512F nor AVX2";
  const Bytes bytes = sample_bytes(64 << 20);
  auto source = make(open_file(folder_.write("model", bytes)), ::pread, CachedPath::mapped);
  Bytes read(bytes.size());
  ASSERT_TRUE(read_now(*source, 0, 0, read));
  EXPECT_EQ(read, bytes);
  EXPECT_EQ(mapped_file_bytes("model"), 0u);
  source.reset();
}

using FileSourceDeathTest = FileSource;
TEST_F(FileSourceDeathTest, a_bus_error_elsewhere_ends_the_process_as_ever) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer writes a report of it, which fails the run";
#endif
  const SourceFile file = open_file(folder_.write("model", Bytes(4096)));
  Bytes read(4096);
  ASSERT_TRUE(read_now(*make(open_file(file.path), ::pread, CachedPath::mapped), 0, 0, read));
  const auto* page = static_cast<const volatile char*>(::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, file.fd.get(), 0));
  ASSERT_EQ(::truncate(file.path.c_str(), 0), 0);
  EXPECT_DEATH(static_cast<void>(*page), "");
}

TEST_F(FileSource, the_end_before_the_range_is_full_is_an_error) {
  auto source = make(Bytes(2048), [](int, void*, size_t size_bytes, off_t offset) {
    return offset == 0 ? static_cast<ssize_t>(size_bytes / 2) : 0;
  });
  Bytes read(2048);
  EXPECT_EQ(failure(*source, 0, read),
            "corrupt: read model at 1024: the file ends 1024 bytes early; was it cut short?");
}

TEST_F(FileSource, more_bytes_than_asked_for_are_an_error) {
  auto source =
      make(Bytes(10), [](int, void*, size_t size_bytes, off_t) { return static_cast<ssize_t>(size_bytes) + 1; });
  Bytes read(10);
  EXPECT_EQ(failure(*source, 0, read), "internal: read model at 0: the system returned 11 bytes for 10 asked for");
}

TEST_F(FileSource, an_error_after_a_few_pieces_ends_the_read) {
  auto source = make(Bytes(4000), [](int, void*, size_t, off_t offset) -> ssize_t {
    if (offset < 3000) return 1000;
    errno = EIO;
    return -1;
  });
  Bytes read(4000);
  EXPECT_EQ(failure(*source, 0, read), "unavailable: read model at 3000: Input/output error");
}

TEST_F(FileSource, a_file_shorter_than_declared_is_corrupt) {
  path_ = folder_.write("model", sample_bytes(1024));
  SourceFile file = open_file(path_);
  file.identity.size_bytes = 2048;
  auto source = make(std::move(file));
  Bytes read(2048);
  EXPECT_EQ(failure(*source, 0, read),
            "corrupt: read model at 1024: the file ends 1024 bytes early; was it cut short?");
  EXPECT_EQ(failure(*source, 2047, std::span(read).first(1)),
            "corrupt: read model at 2047: the file ends 1 bytes early; was it cut short?");
}

TEST_F(FileSource, a_file_cut_short_while_it_is_read_is_an_error_and_never_zeros) {
  auto source = make(sample_bytes(8192), [this](int fd, void* target, size_t size_bytes, off_t offset) {
    if (offset > 0) {
      EXPECT_EQ(::truncate(path_.c_str(), 4096), 0);
    }
    return ::pread(fd, target, std::min<size_t>(size_bytes, 4096), offset);
  });
  Bytes read(8192);
  EXPECT_EQ(failure(*source, 0, read),
            "corrupt: read model at 4096: the file ends 4096 bytes early; was it cut short?");
  EXPECT_EQ(source->check_unchanged(0).error().code, Code::changed);
}

TEST_F(FileSource, bytes_added_since_it_was_opened_are_not_read) {
  path_ = folder_.write("model", Bytes(10));
  auto source = make(open_file(path_));
  ASSERT_EQ(::truncate(path_.c_str(), 20), 0);
  Bytes read(11);
  EXPECT_EQ(failure(*source, 0, read), "corrupt: read model at 0: 11 bytes are needed, the file has 10 in all");
}

TEST_F(FileSource, a_descriptor_that_cannot_be_read_is_named) {
  path_ = folder_.write("model", Bytes(10));
  auto source = make(open_file(path_, O_WRONLY));
  Bytes read(10);
  EXPECT_EQ(failure(*source, 0, read), "unavailable: read model at 0: Bad file descriptor");
}

TEST_F(FileSource, a_changed_file_is_told_by_size_time_and_name) {
  const auto changed_by = [&](auto change) {
    path_ = folder_.write("model", Bytes(10));
    auto source = make(open_file(path_));
    EXPECT_TRUE(source->check_unchanged(0));
    change();
    const Status status = source->check_unchanged(0);
    return status ? "unchanged" : std::string(base::code_name(status.error().code));
  };
  EXPECT_EQ(changed_by([&] { EXPECT_EQ(::truncate(path_.c_str(), 11), 0); }), "changed");
  EXPECT_EQ(changed_by([&] {
              const timespec times[2] = {{.tv_sec = 1, .tv_nsec = 0}, {.tv_sec = 1, .tv_nsec = 0}};
              EXPECT_EQ(::utimensat(AT_FDCWD, path_.c_str(), times, 0), 0);
            }),
            "changed");
  EXPECT_EQ(changed_by([&] { EXPECT_EQ(::unlink(path_.c_str()), 0); }), "changed");
}

TEST_F(FileSource, offsets_past_4_GiB_of_a_sparse_file_are_exact) {
  path_ = folder_.write("model", {});
  const Bytes mark = sample_bytes(64);
  const uint64_t offset = 4 * kGiB + 17;
  SourceFile empty = open_file(path_, O_RDWR);
  ASSERT_EQ(::pwrite(empty.fd.get(), mark.data(), mark.size(), static_cast<off_t>(offset)), 64);
  ASSERT_EQ(::ftruncate(empty.fd.get(), static_cast<off_t>(6 * kGiB)), 0);
  auto source = make(open_file(path_));
  Bytes read(64 + 2);
  ASSERT_TRUE(read_now(*source, 0, offset - 1, read));
  EXPECT_EQ(read.front(), std::byte{0});
  EXPECT_EQ(std::memcmp(read.data() + 1, mark.data(), mark.size()), 0);
  EXPECT_EQ(read.back(), std::byte{0});
  EXPECT_TRUE(read_now(*source, 0, 6 * kGiB - 66, read));
  EXPECT_EQ(read, Bytes(66));
}

// The target is address space alone: the pread of this test touches one byte of each piece.
TEST_F(FileSource, a_read_the_kernel_would_cut_arrives_in_pieces) {
  constexpr size_t kSize = 5 * kGiB;
  void* space = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(space, MAP_FAILED);
  const std::span<std::byte> target(static_cast<std::byte*>(space), kSize);
  path_ = folder_.write("model", {});
  ASSERT_EQ(::truncate(path_.c_str(), static_cast<off_t>(kSize + 100)), 0);
  std::string pieces;
  auto source = make(open_file(path_), [&](int, void* piece, size_t size_bytes, off_t offset) {
    pieces += base::text(offset, "+", size_bytes, "\n");
    EXPECT_EQ(static_cast<std::byte*>(piece) - target.data(), offset - 100);
    *static_cast<std::byte*>(piece) = std::byte{1};
    return static_cast<ssize_t>(size_bytes);
  });
  EXPECT_TRUE(read_now(*source, 0, 100, target));
  EXPECT_EQ(pieces,
            "100+2147479552\n"
            "2147479652+2147479552\n"
            "4294959204+1073750016\n");
  EXPECT_EQ(source->counters().read_bytes, kSize);
  ::munmap(space, kSize);
}

TEST_F(FileSource, reads_begin_in_the_order_they_were_asked_for) {
  std::vector<off_t> order;
  auto source = make(Bytes(100), [&](int fd, void* target, size_t size_bytes, off_t offset) {
    order.push_back(offset);
    return ::pread(fd, target, size_bytes, offset);
  });
  Bytes read(100);
  std::vector<std::future<Status>> reads;
  for (const off_t offset : {0, 30, 60, 10, 90}) {
    reads.push_back(start_read(*source, 0, offset, std::span(read).subspan(offset, 10)));
  }
  for (auto& each : reads) EXPECT_TRUE(each.get());
  EXPECT_EQ(order, (std::vector<off_t>{0, 30, 60, 10, 90}));
}

TEST_F(FileSource, cancel_does_not_wait_for_reads_of_other_sources) {
  std::latch begun(1), go_on(1);
  auto slow = make(Bytes(10), [&](int, void*, size_t size_bytes, off_t) {
    begun.count_down();
    go_on.wait();
    return static_cast<ssize_t>(size_bytes);
  });
  Bytes slow_target(10), target(10);
  auto slow_read = start_read(*slow, 0, 0, slow_target);
  begun.wait();  // the only thread is busy
  path_ = folder_.write("other", Bytes(10));
  auto source = make(open_file(path_));
  auto read = start_read(*source, 0, 0, target);
  source->cancel();
  EXPECT_EQ(read.get().error().code, Code::cancelled);
  source.reset();
  go_on.count_down();
  EXPECT_TRUE(slow_read.get());
}

TEST_F(FileSource, a_long_read_ends_between_its_pieces_when_cancelled) {
  Source* cancelled = nullptr;
  auto source = make(Bytes(100), [&](int, void*, size_t, off_t offset) -> ssize_t {
    if (offset == 50) cancelled->cancel();
    return 10;
  });
  cancelled = source.get();
  Bytes read(100);
  EXPECT_EQ(failure(*source, 0, read), "cancelled: read model at 60: cancelled");
}

// ---- past the page cache ----------------------------------------------------------------------------------------

// A reader whose every read goes through a script.
class ScriptedReader final : public DirectReader {
 public:
  using Script = std::function<int64_t(int fd, std::byte* target, size_t size_bytes, uint64_t offset)>;
  explicit ScriptedReader(Script script) : script_(std::move(script)) {}
  const char* name() const override { return "script"; }
  void read(int fd, std::byte* target, size_t size_bytes, uint64_t offset, Done done) override {
    done(script_(fd, target, size_bytes, offset));
  }

 private:
  const Script script_;
};

int64_t plain_read(int fd, std::byte* target, size_t size_bytes, uint64_t offset) {
  const ssize_t got = ::pread(fd, target, size_bytes, static_cast<off_t>(offset));
  return got < 0 ? -errno : got;
}

// A file of 4 MiB and a bit that lies on the disk alone, and a target like the image of it.
class DirectFileSource : public FileSource {
 protected:
  void SetUp() override {
    path_ = folder_.write("model", bytes_);
    forget();
  }
  void forget() {
    const SourceFile file = open_file(path_);
    ASSERT_EQ(::fdatasync(file.fd.get()), 0);
    ASSERT_EQ(::posix_fadvise(file.fd.get(), 0, 0, POSIX_FADV_DONTNEED), 0);
  }
  std::unique_ptr<Source> make_direct(DirectReader& reader, CacheLeft left = CacheLeft::keep) {
    std::vector<SourceFile> files;
    files.push_back(open_file(path_));
    return make_file_source(std::move(files), *pool_, {.direct = &reader, .cache_left = left});
  }
  std::span<std::byte> target() {
    return std::span(memory_).subspan(-reinterpret_cast<uint64_t>(memory_.data()) % 4096, bytes_.size());
  }
  bool is_whole() { return std::equal(bytes_.begin(), bytes_.end(), target().begin()); }

  const Bytes bytes_ = sample_bytes((4 << 20) + 777);
  Bytes memory_ = Bytes(bytes_.size() + 8192);
};

TEST_F(DirectFileSource, what_is_not_cached_goes_past_the_page_cache_and_what_is_comes_from_it) {
  ScriptedReader reader(plain_read);
  auto source = make_direct(reader);
  ASSERT_TRUE(read_now(*source, 0, 0, target()));
  EXPECT_TRUE(is_whole());
  EXPECT_EQ(source->counters().direct_bytes, 4u << 20);
  EXPECT_EQ(source->counters().buffered_bytes, 777u);
  EXPECT_EQ(source->read_path(), "script, O_DIRECT");
  // The second MiB is brought into the cache.
  const SourceFile file = open_file(path_);
  Bytes warm(1 << 20);
  ASSERT_EQ(::posix_fadvise(file.fd.get(), 0, 0, POSIX_FADV_RANDOM), 0);
  ASSERT_EQ(::pread(file.fd.get(), warm.data(), warm.size(), 1 << 20), 1 << 20);
  source = make_direct(reader);
  ASSERT_TRUE(read_now(*source, 0, 0, target()));
  EXPECT_TRUE(is_whole());
  EXPECT_EQ(source->counters().direct_bytes, 3u << 20);
  EXPECT_EQ(source->counters().cached_bytes, (1u << 20) + 777) << "the end was left in the cache by the first read";
}

TEST_F(DirectFileSource, partial_and_interrupted_reads_are_carried_on) {
  int call_count = 0;
  ScriptedReader reader([&](int fd, std::byte* into, size_t size_bytes, uint64_t offset) -> int64_t {
    if (++call_count % 2 == 1) return -EINTR;
    return plain_read(fd, into, std::min<size_t>(size_bytes, 300 << 10), offset);
  });
  auto source = make_direct(reader);
  ASSERT_TRUE(read_now(*source, 0, 0, target()));
  EXPECT_TRUE(is_whole());
  EXPECT_GT(call_count, 20);
  EXPECT_TRUE(source->notes().empty());
}

TEST_F(DirectFileSource, a_reader_that_gives_up_halfway_leaves_the_rest_to_the_page_cache_and_a_note) {
  for (const int error : {EINVAL, ENOSYS, ECANCELED, ENOMEM}) {
    forget();
    ScriptedReader reader([&](int fd, std::byte* into, size_t size_bytes, uint64_t offset) -> int64_t {
      return offset == 0 ? plain_read(fd, into, std::min<size_t>(size_bytes, 1 << 20), offset) : -error;
    });
    auto source = make_direct(reader);
    ASSERT_TRUE(read_now(*source, 0, 0, target()));
    EXPECT_TRUE(is_whole());
    EXPECT_EQ(source->counters().direct_bytes, 1u << 20);
    EXPECT_EQ(source->read_path(), "page cache");
    ASSERT_EQ(source->notes().size(), 1u);
    EXPECT_NE(source->notes()[0].find(std::strerror(error)), std::string::npos) << source->notes()[0];
  }
}

TEST_F(DirectFileSource, an_error_of_the_disk_names_the_place) {
  ScriptedReader reader([&](int fd, std::byte* into, size_t size_bytes, uint64_t offset) -> int64_t {
    return offset == 0 ? plain_read(fd, into, std::min<size_t>(size_bytes, 2 << 20), offset) : -EIO;
  });
  auto source = make_direct(reader);
  EXPECT_EQ(failure(*source, 0, target()), "unavailable: read model at 2097152: Input/output error");
}

TEST_F(DirectFileSource, a_file_cut_short_is_an_error_and_never_zeros) {
  ScriptedReader reader([&](int fd, std::byte* into, size_t size_bytes, uint64_t offset) {
    if (offset > 0) {
      EXPECT_EQ(::truncate(path_.c_str(), (2 << 20) + 10), 0);
    }
    return plain_read(fd, into, std::min<size_t>(size_bytes, 1 << 20), offset);
  });
  auto source = make_direct(reader);
  EXPECT_EQ(failure(*source, 0, target()),
            "corrupt: read model at 2097162: the file ends 2097919 bytes early; was it cut short?");
}

TEST_F(DirectFileSource, nothing_stays_in_the_page_cache_when_it_is_to_be_dropped) {
  ScriptedReader refusing([](int, std::byte*, size_t, uint64_t) -> int64_t { return -EINVAL; });
  auto source = make_direct(refusing, CacheLeft::drop);
  ASSERT_TRUE(read_now(*source, 0, 0, target()));
  EXPECT_TRUE(is_whole());
  const SourceFile file = open_file(path_);
  EXPECT_FALSE(is_cached(file.fd.get(), 1 << 20, 4096));
  source = make_direct(refusing, CacheLeft::keep);
  ASSERT_TRUE(read_now(*source, 0, 0, target()));
  EXPECT_TRUE(is_cached(file.fd.get(), 1 << 20, 4096));
}

TEST_F(DirectFileSource, a_small_file_and_a_target_unlike_the_file_are_read_through_the_page_cache) {
  ScriptedReader reader([](int, std::byte*, size_t, uint64_t) -> int64_t {
    ADD_FAILURE() << "a direct read";
    return -EIO;
  });
  auto source = make_direct(reader);
  Bytes shifted(bytes_.size() + 8192);
  const auto unlike = std::span(shifted).subspan(-reinterpret_cast<uint64_t>(shifted.data()) % 4096 + 8, bytes_.size());
  ASSERT_TRUE(read_now(*source, 0, 0, unlike));
  EXPECT_TRUE(std::equal(bytes_.begin(), bytes_.end(), unlike.begin()));
  path_ = folder_.write("small", sample_bytes(4096));
  source = make_direct(reader);
  EXPECT_TRUE(read_now(*source, 0, 0, target().first(4096)));
  EXPECT_EQ(source->read_path(), "page cache");
}

TEST_F(DirectFileSource, a_file_system_without_direct_reads_is_no_failure) {
  const base::Fd memory(::memfd_create("tensord-test", MFD_CLOEXEC));
  ASSERT_EQ(::write(memory.get(), bytes_.data(), bytes_.size()), static_cast<ssize_t>(bytes_.size()));
  path_ = "/proc/self/fd/" + std::to_string(memory.get());
  auto reader = start_pread_reader(1).value();
  auto source = make_direct(*reader);
  ASSERT_TRUE(read_now(*source, 0, 0, target()));
  EXPECT_TRUE(is_whole());
}

TEST_F(DirectFileSource, many_ranges_of_many_threads_arrive_whole_by_either_reader) {
  constexpr int kThreadCount = 16, kRangeCount = 1000;
  for (auto& reader : {start_uring_reader(), start_pread_reader()}) {
    forget();
    ASSERT_TRUE(reader) << reader.error().message;
    auto source = make_direct(**reader);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreadCount; ++thread) {
      threads.emplace_back([&, thread] {
        std::mt19937 random(static_cast<unsigned>(thread));
        Bytes memory((256 << 10) + 8192);
        for (int i = 0; i < kRangeCount; ++i) {
          const uint64_t offset = random() % bytes_.size();
          const size_t size_bytes = std::min<size_t>(random() % (256 << 10), bytes_.size() - offset);
          const size_t shift = (offset - reinterpret_cast<uint64_t>(memory.data())) % 4096;
          const auto into = std::span(memory).subspan(shift, size_bytes);
          ASSERT_TRUE(read_now(*source, 0, offset, into));
          ASSERT_EQ(std::memcmp(into.data(), bytes_.data() + offset, size_bytes), 0);
          if (i % 100 == thread) forget();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

TEST(ReadPool, threads_carry_a_name_for_people_who_look) {
  std::promise<std::string> name;
  auto pool = start_read_pool(2).value();
  EXPECT_EQ(pool->thread_count(), 2);
  pool->post(this, [&] {
    char text[16];
    pthread_getname_np(pthread_self(), text, sizeof text);
    name.set_value(text);
  });
  EXPECT_EQ(name.get_future().get(), "tensord-read");
}

TEST(ReadPool, withdrawn_work_goes_back_to_its_owner_alone) {
  std::latch begun(1), go_on(1), kept_done(1);
  auto pool = start_read_pool(1).value();
  const int owner = 0, other = 0;
  pool->post(&owner, [&] {
    begun.count_down();
    go_on.wait();
  });
  begun.wait();
  std::string order;
  pool->post(&owner, [&] { order += "first "; });
  pool->post(&other, [&] { kept_done.count_down(); });
  pool->post(&owner, [&] { order += "second"; });
  for (const auto& work : pool->withdraw(&owner)) work();
  EXPECT_EQ(order, "first second");
  EXPECT_TRUE(pool->withdraw(&owner).empty());
  go_on.count_down();
  kept_done.wait();
}

}  // namespace
}  // namespace tensord::storage
