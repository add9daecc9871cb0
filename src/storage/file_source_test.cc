#include "storage/file_source.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <latch>

#include "base/bytes.h"
#include "base/text.h"
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

class FileSource : public testing::Test {
 protected:
  std::unique_ptr<Source> make(SourceFile file, PreadFunction pread = system_pread()) {
    std::vector<SourceFile> files;
    files.push_back(std::move(file));
    return make_file_source(std::move(files), *pool_, std::move(pread));
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
    if (const size_t at = message.find(path_); at != std::string::npos)
      message.replace(at, path_.size(), "model");
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

TEST_F(FileSource, the_end_before_the_range_is_full_is_an_error) {
  auto source = make(Bytes(2048), [](int, void*, size_t size_bytes, off_t offset) {
    return offset == 0 ? static_cast<ssize_t>(size_bytes / 2) : 0;
  });
  Bytes read(2048);
  EXPECT_EQ(failure(*source, 0, read),
            "corrupt: read model at 1024: the file ends 1024 bytes early; was it cut short?");
}

TEST_F(FileSource, more_bytes_than_asked_for_are_an_error) {
  auto source = make(
      Bytes(10), [](int, void*, size_t size_bytes, off_t) { return static_cast<ssize_t>(size_bytes) + 1; });
  Bytes read(10);
  EXPECT_EQ(failure(*source, 0, read),
            "internal: read model at 0: the system returned 11 bytes for 10 asked for");
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
  EXPECT_EQ(source->check_unchanged().error().code, Code::changed);
}

TEST_F(FileSource, bytes_added_since_it_was_opened_are_not_read) {
  path_ = folder_.write("model", Bytes(10));
  auto source = make(open_file(path_));
  ASSERT_EQ(::truncate(path_.c_str(), 20), 0);
  Bytes read(11);
  EXPECT_EQ(failure(*source, 0, read),
            "corrupt: read model at 0: 11 bytes are needed, the file has 10 in all");
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
    EXPECT_TRUE(source->check_unchanged());
    change();
    const Status status = source->check_unchanged();
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
  void* space =
      ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
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
