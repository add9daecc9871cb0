#include "rpc/index_rows.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

namespace tensord::rpc {

namespace {

tensor::Index sample() {
  tensor::Index index;
  index.files = {{"/a", 1000}, {"/b", 50}};
  index.metadata = {{"format", "pt"}};
  index.tensors = {
      {.name = "x",
       .dtype = tensor::Dtype::bf16,
       .dtype_text = "BF16",
       .shape = {2, 3},
       .offset = 100,
       .size_bytes = 12},
      {.name = "y",
       .dtype = tensor::Dtype::opaque,
       .dtype_text = "NEW",
       .shape = {},
       .file = 1,
       .offset = 49,
       .size_bytes = 1},
  };
  return index;
}

uint64_t size_of(const base::Fd& fd) { return base::identify_file(fd.get(), "index").value().size_bytes; }

base::Result<tensor::Index> round_trip(const tensor::Index& index) {
  const base::Fd encoded = encode_index(index).value();
  return decode_index(encoded, size_of(encoded));
}

bool refused(void (*spoil)(tensor::Index&)) {
  tensor::Index index = sample();
  spoil(index);
  const auto decoded = round_trip(index);
  return !decoded && decoded.error().code == base::Code::corrupt;
}

}  // namespace

TEST(IndexRows, an_index_comes_back_as_it_went) { EXPECT_EQ(round_trip(sample()).value(), sample()); }

TEST(IndexRows, files_without_tensors_come_back_too) {
  const tensor::Index index{.files = {{"/a", tensor::kIndexBytesMax}}};
  EXPECT_EQ(round_trip(index).value(), index);
}

TEST(IndexRows, no_files_and_files_too_large_to_be_mapped_are_refused) {
  EXPECT_FALSE(round_trip({}));
  EXPECT_TRUE(refused([](tensor::Index& index) { index.files[1].size_bytes = tensor::kIndexBytesMax; }));
  EXPECT_TRUE(refused([](tensor::Index& index) { index.files[1].size_bytes = UINT64_MAX; }));
}

TEST(IndexRows, a_shape_of_another_size_than_the_tensor_is_refused) {
  EXPECT_TRUE(refused([](tensor::Index& index) { index.tensors[0].shape = {2, 4}; }));
  EXPECT_TRUE(refused([](tensor::Index& index) { index.tensors[0].shape = {2, 0}; }));
  EXPECT_TRUE(refused([](tensor::Index& index) {
    index.tensors[0].shape = {1ull << 32, 1ull << 32};  // 2^64 elements
    index.tensors[0].size_bytes = 0;
  }));
  tensor::Index index = sample();
  index.tensors[0].shape = {UINT64_MAX, 0, 3};
  index.tensors[0].size_bytes = 0;
  EXPECT_EQ(round_trip(index).value(), index);
}

TEST(IndexRows, one_name_twice_is_refused) {
  EXPECT_TRUE(refused([](tensor::Index& index) { index.tensors[0].name = index.tensors[1].name; }));
}

TEST(IndexRows, tensors_outside_of_their_file_or_over_each_other_are_refused) {
  EXPECT_TRUE(refused([](tensor::Index& index) { index.tensors[0].file = 2; }));
  EXPECT_TRUE(refused([](tensor::Index& index) { index.tensors[1].size_bytes = 2; }));
  EXPECT_TRUE(refused([](tensor::Index& index) { index.tensors[1].offset = UINT64_MAX; }));
  EXPECT_TRUE(refused([](tensor::Index& index) { index.tensors[0].dtype = static_cast<tensor::Dtype>(99); }));
  EXPECT_TRUE(refused([](tensor::Index& index) { std::swap(index.tensors[0], index.tensors[1]); }));
  EXPECT_TRUE(refused([](tensor::Index& index) {
    index.tensors[1].file = 0;
    index.tensors[1].offset = 111;
  }));
}

TEST(IndexRows, memory_that_is_not_sealed_or_of_another_size_is_refused) {
  const base::Fd encoded = encode_index(sample()).value();
  EXPECT_FALSE(decode_index(encoded, size_of(encoded) + 1));
  base::Fd open_memory(::memfd_create("open", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(open_memory.get(), 64), 0);
  EXPECT_FALSE(decode_index(open_memory, 64));
}

TEST(IndexRows, garbage_is_refused) {
  const tensor::Index index = sample();
  const base::Fd encoded = encode_index(index).value();
  std::vector<std::byte> bytes(size_of(encoded));
  ASSERT_TRUE(base::read_exactly(encoded.get(), 0, bytes, "index"));
  for (size_t at = 0; at < bytes.size(); at += 4) {
    base::Fd fd(::memfd_create("garbage", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    std::vector<std::byte> damaged = bytes;
    damaged[at] = std::byte{0xff};
    ASSERT_EQ(::write(fd.get(), damaged.data(), damaged.size()), static_cast<ssize_t>(damaged.size()));
    ASSERT_EQ(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE), 0);
    const auto decoded = decode_index(fd, damaged.size());
    if (!decoded) continue;
    EXPECT_LE(decoded->tensors.size(), 2u);  // a changed name or number is still an index
  }
}

}  // namespace tensord::rpc
