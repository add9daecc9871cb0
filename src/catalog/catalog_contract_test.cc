// What holds for a Catalog in a file and in memory.
#include <gtest/gtest.h>

#include "catalog/catalog_testing.h"

namespace tensord::catalog {
namespace {

class FileOrMemory : public testing::TestWithParam<const char*> {
 protected:
  std::unique_ptr<Catalog> make(const CatalogOptions& options = {}) {
    const bool in_memory = GetParam() == std::string("memory");
    return Catalog::open(in_memory ? Catalog::kInMemory : folder_.file("catalog"), options).value();
  }

 private:
  ScratchFolder folder_;
};

INSTANTIATE_TEST_SUITE_P(Catalog, FileOrMemory, testing::Values("file", "memory"),
                         [](const auto& name) { return std::string(name.param); });

TEST_P(FileOrMemory, an_empty_catalog_knows_nothing) {
  auto catalog = make();
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(1))), "absent");
}

TEST_P(FileOrMemory, what_is_remembered_is_found_as_it_was) {
  auto catalog = make();
  ASSERT_TRUE(catalog->remember({sample_file(1), sample_file(2, 1000)}));
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(1))),
            "42/1/1001/1700000000000000000 /models/1 layout 0708090a0b0c0d0e0f10111213141516\n"
            "  0102030405060708090a0b0c0d0e0f10\n"
            "  02030405060708090a0b0c0d0e0f1011\n"
            "  030405060708090a0b0c0d0e0f101112");
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(2))), to_text(sample_file(2, 1000)));
}

TEST_P(FileOrMemory, every_value_of_every_field_survives) {
  auto catalog = make();
  FileRecord file{{UINT64_MAX, UINT64_MAX - 1, UINT64_MAX - 2, INT64_MIN}, "/\xff\n'\";--", {}, {}};
  ASSERT_TRUE(catalog->remember({file}));
  EXPECT_EQ(to_text(catalog->find_file(file.identity)), to_text(file));
}

TEST_P(FileOrMemory, a_file_is_found_by_its_whole_identity_only) {
  auto catalog = make();
  ASSERT_TRUE(catalog->remember({sample_file(1)}));
  for (const auto field : {&base::FileIdentity::device, &base::FileIdentity::inode, &base::FileIdentity::size_bytes}) {
    base::FileIdentity other = sample_identity(1);
    ++(other.*field);
    EXPECT_EQ(to_text(catalog->find_file(other)), "absent");
  }
  base::FileIdentity other = sample_identity(1);
  ++other.mtime_ns;
  EXPECT_EQ(to_text(catalog->find_file(other)), "absent");
}

TEST_P(FileOrMemory, a_later_record_of_a_file_replaces_the_older_one) {
  auto catalog = make();
  FileRecord rewritten = sample_file(1, 2);
  ++rewritten.identity.mtime_ns;
  ASSERT_TRUE(catalog->remember({sample_file(1), sample_file(2)}));
  ASSERT_TRUE(catalog->remember({rewritten}));
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(1))), "absent");
  EXPECT_EQ(to_text(catalog->find_file(rewritten.identity)), to_text(rewritten));
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(2))), to_text(sample_file(2)));
}

TEST_P(FileOrMemory, of_equal_files_in_one_call_the_last_counts) {
  auto catalog = make();
  ASSERT_TRUE(catalog->remember({sample_file(1, 1), sample_file(1, 2)}));
  EXPECT_EQ(to_text(catalog->find_file(sample_identity(1))), to_text(sample_file(1, 2)));
}

TEST_P(FileOrMemory, the_oldest_are_forgotten_above_the_limits) {
  auto catalog = make({.file_count_max = 3});
  ASSERT_TRUE(catalog->remember({sample_file(1), sample_file(2), sample_file(3)}));
  ASSERT_TRUE(catalog->remember({sample_file(1)}));
  ASSERT_TRUE(catalog->remember({sample_file(4)}));
  std::string known;
  for (const uint64_t inode : {1, 2, 3, 4})
    known += to_text(catalog->find_file(sample_identity(inode))) == "absent" ? "-" : "x";
  EXPECT_EQ(known, "x-xx");
}

TEST(CatalogInMemory, each_is_its_own_and_leaves_no_file) {
  auto catalog = Catalog::open(Catalog::kInMemory).value();
  ASSERT_TRUE(catalog->remember({sample_file(1)}));
  EXPECT_EQ(to_text(Catalog::open(Catalog::kInMemory).value()->find_file(sample_identity(1))), "absent");
  EXPECT_FALSE(std::filesystem::exists(Catalog::kInMemory));
}

}  // namespace
}  // namespace tensord::catalog
