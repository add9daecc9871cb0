#include "catalog/catalog.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>

#include "catalog/catalog_testing.h"

namespace tensord::catalog {
namespace {

using base::Code;

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

class CatalogFile : public testing::Test {
 protected:
  Result<std::unique_ptr<Catalog>> open() { return Catalog::open(path_, {.busy_timeout_ms = 0}); }

  // Remembers files 1 and 2, and closes.
  void fill(size_t leaf_count = 3) {
    ASSERT_TRUE((*open())->remember({sample_file(1, leaf_count), sample_file(2, leaf_count)}));
  }
  void execute(const std::string& sql) { Stranger(path_).execute(sql); }

  // "code: message", the folder left out.
  template <typename T>
  std::string failure(const Result<T>& result) {
    if (result) return "it succeeded";
    std::string message = result.error().message;
    if (const size_t at = message.find(path_); at != std::string::npos) message.replace(at, path_.size(), "PATH");
    return base::text(base::code_name(result.error().code), ": ", message);
  }

  ScratchFolder folder_;
  std::string path_ = folder_.file("catalog");
};

constexpr const char* kDeletable = "; it can be deleted, the next loads fill it again";

TEST_F(CatalogFile, records_outlive_the_daemon) {
  fill();
  auto catalog = *open();
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(2))), to_text(sample_file(2)));
}

TEST_F(CatalogFile, its_files_are_for_their_user_alone) {
  auto catalog = *open();
  ASSERT_TRUE(catalog->remember({sample_file(2)}));
  for (const char* suffix : {"", "-wal", "-shm"}) {
    struct stat status;
    ASSERT_EQ(::stat((path_ + suffix).c_str(), &status), 0) << suffix;
    EXPECT_EQ(status.st_mode & 0777, 0600u) << suffix;
  }
}

TEST_F(CatalogFile, a_missing_folder_is_not_found) {
  path_ = folder_.file("missing/catalog");
  EXPECT_EQ(failure(open()), "not_found: create the catalog PATH: No such file or directory");
}

TEST_F(CatalogFile, a_folder_in_its_place_is_refused) {
  ASSERT_EQ(::mkdir(path_.c_str(), 0700), 0);
  EXPECT_EQ(failure(open()).substr(0, 38), "invalid_argument: catalog PATH: open: ");
}

TEST_F(CatalogFile, garbage_is_corrupt_and_said_to_be_deletable) {
  write_bytes(path_, std::string(8192, 'x'));
  EXPECT_EQ(failure(open()), base::text("corrupt: catalog PATH: open: file is not a database", kDeletable));
}

TEST_F(CatalogFile, a_database_of_another_program_is_left_alone) {
  execute("CREATE TABLE songs(name TEXT)");
  const std::string before = read_bytes(path_);
  EXPECT_EQ(failure(open()),
            base::text("corrupt: catalog PATH: open: it is a database of another program", kDeletable));
  EXPECT_EQ(read_bytes(path_), before);
}

TEST_F(CatalogFile, a_newer_schema_is_unsupported) {
  fill();
  execute("PRAGMA user_version = 2");
  EXPECT_EQ(failure(open()),
            "unsupported: catalog PATH: open: version 2 is of a newer tensord, this one knows 1; use that "
            "tensord or "
            "another state folder");
  execute("PRAGMA user_version = -1");
  EXPECT_EQ(failure(open()), base::text("corrupt: catalog PATH: open: there never was a version -1", kDeletable));
}

TEST_F(CatalogFile, a_schema_that_is_not_the_one_of_its_version_is_corrupt) {
  fill();
  execute("ALTER TABLE files DROP COLUMN leaves");
  EXPECT_EQ(failure(open()), base::text("corrupt: catalog PATH: read the schema: no such column: leaves", kDeletable));
}

TEST_F(CatalogFile, records_of_a_wrong_size_are_corrupt) {
  fill();
  const std::string damaged = base::text("the record is damaged", kDeletable);
  for (const char* change : {"leaves = x'00112233'", "layout_digest = x''", "layout_digest = zeroblob(32)"}) {
    execute(base::text("UPDATE files SET ", change));
    EXPECT_EQ(failure((*open())->find_file(sample_identity(1))),
              base::text("corrupt: catalog PATH: find a file: ", damaged));
    fill();
  }
}

TEST_F(CatalogFile, columns_of_a_wrong_type_are_corrupt) {
  execute(
      "CREATE TABLE files(number INTEGER PRIMARY KEY, device, inode, size_bytes, mtime_ns, path, "
      "layout_digest, leaves);"
      "INSERT INTO files VALUES(1, 42, 1, 1001, 1700000000000000000, NULL, 3.5, 'text of 16 bytes');"
      "PRAGMA application_id = 1414745668; PRAGMA user_version = 1");
  auto catalog = *open();
  EXPECT_EQ(catalog->find_file(sample_identity(1)).error().code, Code::corrupt);
}

TEST_F(CatalogFile, triggers_in_the_file_are_not_run) {
  fill();
  execute("CREATE TRIGGER spoil AFTER INSERT ON files BEGIN DELETE FROM files; END");
  auto catalog = *open();
  ASSERT_TRUE(catalog->remember({sample_file(3)}));
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(1))), to_text(sample_file(1)));
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(3))), to_text(sample_file(3)));
}

TEST_F(CatalogFile, damage_anywhere_is_an_error_or_harmless) {
  const auto seed = static_cast<uint32_t>(GTEST_FLAG_GET(random_seed));
  SCOPED_TRACE("--gtest_random_seed=" + std::to_string(seed));
  std::mt19937 random(seed);
  fill(1000);
  const std::string intact = read_bytes(path_);
  const auto expect_named = [](const auto& result) {
    if (result) return;
    EXPECT_TRUE(result.error().code == Code::corrupt || result.error().code == Code::unsupported)
        << result.error().message;
  };
  for (int round = 0; round < 200; ++round) {
    std::string damaged = intact;
    if (round % 4 == 0) damaged.resize(1 + random() % damaged.size());
    for (uint32_t i = random() % 20; i > 0; --i) damaged[random() % damaged.size()] = static_cast<char>(random());
    for (const char* suffix : {"-wal", "-shm"}) ::unlink((path_ + suffix).c_str());
    write_bytes(path_, damaged);
    auto catalog = open();
    expect_named(catalog);
    if (!catalog) continue;
    expect_named((*catalog)->find_file(sample_identity(1)));
    expect_named((*catalog)->remember({sample_file(2), sample_file(3)}));
  }
}

TEST_F(CatalogFile, a_full_disk_is_exhausted_and_leaves_what_was_known) {
  // The mount is seen by this thread alone and goes with it.
  std::string refused;
  std::thread([&] {
    if (::unshare(CLONE_FS | CLONE_NEWNS) != 0 || ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("tensord-test", folder_.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
      refused = std::strerror(errno);
      return;
    }
    auto catalog = *open();
    ASSERT_TRUE(catalog->remember({sample_file(1)}));
    EXPECT_EQ(failure(catalog->remember({sample_file(2), sample_file(3, 100'000)})),
              "exhausted: catalog PATH: remember /models/2: database or disk is full; free space there");
    EXPECT_EQ(to_text(catalog->find_file(sample_identity(1))), to_text(sample_file(1)));
    EXPECT_EQ(to_text(catalog->find_file(sample_identity(2))), "absent");
    EXPECT_TRUE(catalog->remember({sample_file(3)})) << "what fits is remembered again";
  }).join();
  if (!refused.empty()) GTEST_SKIP() << "no tmpfs of 1 MiB to fill can be mounted here: " << refused;
}

TEST_F(CatalogFile, a_file_that_can_only_be_read_is_denied) {
  fill();
  ASSERT_EQ(::chmod(path_.c_str(), 0444), 0);
  ASSERT_EQ(::chmod(folder_.path().c_str(), 0755), 0);
  constexpr uid_t kNobody = 65534;  // root may write everything
  const bool is_root = ::geteuid() == 0;
  ASSERT_TRUE(!is_root || ::seteuid(kNobody) == 0);
  const std::string failed = failure(open());
  ASSERT_TRUE(!is_root || ::seteuid(0) == 0);
  EXPECT_EQ(failed, "denied: catalog PATH: open: it can only be read; it must be writable by this user");
}

TEST_F(CatalogFile, two_processes_may_have_it_open) {
  auto first = *open();
  auto second = *open();
  ASSERT_TRUE(first->remember({sample_file(1)}));
  ASSERT_TRUE(second->remember({sample_file(2)}));
  EXPECT_EQ(to_text(first->find_file(sample_identity(2))), to_text(sample_file(2)));
  EXPECT_EQ(to_text(second->find_file(sample_identity(1))), to_text(sample_file(1)));
}

TEST_F(CatalogFile, a_busy_catalog_is_unavailable_for_writing_and_can_be_read) {
  fill();
  auto catalog = *open();
  {
    Stranger stranger(path_);
    stranger.execute("BEGIN IMMEDIATE");
    EXPECT_EQ(failure(catalog->remember({sample_file(2)})),
              "unavailable: catalog PATH: remember /models/2: database is locked; another process may hold it");
    EXPECT_EQ(to_text(catalog->find_file(sample_identity(1))), to_text(sample_file(1)));
  }
  EXPECT_TRUE(catalog->remember({sample_file(2)}));
}

TEST_F(CatalogFile, many_may_open_a_catalog_that_does_not_exist_yet) {
  for (int round = 0; round < 10; ++round) {
    path_ = folder_.file(std::to_string(round));
    std::vector<std::thread> threads;
    for (uint8_t i = 0; i < 8; ++i) {
      threads.emplace_back([this, i] {
        auto catalog = Catalog::open(path_, {.busy_timeout_ms = 60'000});
        ASSERT_TRUE(catalog) << catalog.error().message;
        const Status status = (*catalog)->remember({sample_file(i)});
        EXPECT_TRUE(status) << status.error().message;
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (uint8_t i = 0; i < 8; ++i)
      EXPECT_EQ(to_text((*open())->find_file(sample_identity(i))), to_text(sample_file(i)));
  }
}

}  // namespace
}  // namespace tensord::catalog
