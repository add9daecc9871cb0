#include "tensor/digest.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "tensor/blocks.h"
#include "tensor/digest_wide.h"

namespace tensord::tensor {

namespace {

std::vector<std::byte> sample(size_t size_bytes) {
  std::vector<std::byte> bytes(size_bytes);
  uint32_t state = 1;
  for (std::byte& byte : bytes) {
    state = state * 1664525 + 1013904223;
    byte = static_cast<std::byte>(state >> 24);
  }
  return bytes;
}

std::string hash_text(std::string_view text) { return hash(std::as_bytes(std::span(text))).to_text(); }

// The digest of every tensor, computed leaf by leaf from `images`, the files' bytes.
std::vector<Digest> tensor_digests(const Index& index, const std::vector<std::vector<std::byte>>& images) {
  const ImageLayout layout = lay_out(index);
  std::vector<std::vector<Digest>> leaves(index.tensors.size());
  for (const Leaf& leaf : layout.leaves) {
    const uint32_t file = index.tensors[leaf.tensor].file;
    const uint64_t offset = leaf.file_offset;
    leaves[leaf.tensor].push_back(hash(std::span(images[file]).subspan(offset, leaf.size_bytes)));
  }
  std::vector<Digest> digests;
  for (const auto& of_tensor : leaves) digests.push_back(tensor_digest(of_tensor));
  return digests;
}

struct Model {
  Index index;
  std::vector<std::vector<std::byte>> images;
  void add(std::string name, std::vector<uint64_t> shape, uint32_t file, std::span<const std::byte> bytes) {
    while (images.size() <= file) {
      images.emplace_back(64 + images.size(), std::byte{'h'});
      index.files.push_back({});
    }
    auto& image = images[file];
    index.tensors.push_back({.name = std::move(name),
                             .dtype = Dtype::u8,
                             .dtype_text = "U8",
                             .shape = std::move(shape),
                             .file = file,
                             .offset = image.size(),
                             .size_bytes = bytes.size()});
    image.insert(image.end(), bytes.begin(), bytes.end());
    index.files[file].size_bytes = image.size();
    std::sort(index.tensors.begin(), index.tensors.end(),
              [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
  }
  std::string id() const { return artifact_id(index, tensor_digests(index, images)).to_text(); }
};

}  // namespace

TEST(Digest, known_answers) {
  EXPECT_EQ(hash_text(""), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(hash_text("a"), "a96faf705af16834e6c632b61e964e1f");
  EXPECT_EQ(hash_text("abc"), "06b05ab6733a618578af5f94892f3950");
}

TEST(Digest, every_set_of_vector_instructions_gives_the_same_result) {
  const std::vector<std::byte> bytes = sample((3 << 20) + 64);
  std::vector<size_t> sizes{1 << 20, (1 << 20) - 1, (1 << 20) + 1, 3 << 20};
  for (size_t size = 0; size <= 2100; ++size) sizes.push_back(size);
  for (const size_t size : sizes) {
    for (const size_t offset : {0, 1, 31}) {
      Digest narrow;
      hash_sse2.whole(bytes.data() + offset, size, narrow.bytes.data());
      EXPECT_EQ(hash(std::span(bytes).subspan(offset, size)), narrow);
      Digest wide;
      if (__builtin_cpu_supports("avx2")) {
        hash_avx2.whole(bytes.data() + offset, size, wide.bytes.data());
        ASSERT_EQ(wide, narrow) << size;
      }
      if (__builtin_cpu_supports("avx512f")) {
        hash_avx512.whole(bytes.data() + offset, size, wide.bytes.data());
        ASSERT_EQ(wide, narrow) << size;
      }
    }
  }
}

TEST(Digest, text_is_32_lower_case_digits) { EXPECT_EQ(hash({}).to_text(), "99aa06d3014798d86001c324468d497f"); }

TEST(Digest, an_empty_tensor_has_the_digest_of_nothing) { EXPECT_EQ(tensor_digest({}), hash({})); }

TEST(Digest, one_flipped_bit_anywhere_changes_a_tensor_of_any_size) {
  for (const size_t size : {1ul, 7ul, 8ul, 9ul, kLeafBytes - 1, kLeafBytes, kLeafBytes + 1, 3 * kLeafBytes}) {
    std::vector<std::byte> bytes = sample(size);
    Model model;
    model.add("w", {size}, 0, bytes);
    const Digest whole = tensor_digests(model.index, model.images)[0];
    for (const size_t place : {size_t{0}, size / 2, size - 1}) {
      model.images[0][64 + place] ^= std::byte{1};
      EXPECT_NE(tensor_digests(model.index, model.images)[0], whole) << size << " " << place;
      model.images[0][64 + place] ^= std::byte{1};
    }
    EXPECT_EQ(tensor_digests(model.index, model.images)[0], whole);
  }
}

TEST(ArtifactId, does_not_depend_on_files_order_headers_or_metadata) {
  const std::vector<std::byte> a = sample((2 << 20) + 5), b = sample(100), c = sample(1 << 20);
  Model one;
  one.add("a", {a.size()}, 0, a);
  one.add("b", {10, 10}, 0, b);
  one.add("c", {c.size()}, 0, c);
  one.add("e", {0}, 0, {});
  Model other;
  other.add("e", {0}, 1, {});
  other.add("c", {c.size()}, 1, c);
  other.add("b", {10, 10}, 0, b);
  other.add("a", {a.size()}, 1, a);
  other.index.metadata = {{"format", "pt"}};
  EXPECT_EQ(one.id(), other.id());
}

TEST(ArtifactId, changes_with_every_name_dtype_shape_and_byte) {
  const auto build = [](const std::function<void(Model&)>& change) {
    Model model;
    model.add("a", {2, 3}, 0, sample(6));
    model.add("b", {4}, 0, sample(4));
    change(model);
    return model.id();
  };
  std::vector<std::string> ids{
      build([](Model&) {}),
      build([](Model& model) { model.index.tensors[1].name = "c"; }),
      build([](Model& model) { model.index.tensors[0].dtype = Dtype::i8; }),
      build([](Model& model) {
        model.index.tensors[0].dtype = Dtype::opaque;
        model.index.tensors[0].dtype_text = "U8X";
      }),
      build([](Model& model) {
        model.index.tensors[0].shape = {3, 2};
      }),
      build([](Model& model) { model.index.tensors[0].shape = {6}; }),
      build([](Model& model) {
        model.index.tensors[0].shape = {2, 3, 1};
      }),
      build([](Model& model) { model.images[0].back() ^= std::byte{1}; }),
      build([](Model& model) { model.add("c", {0}, 0, {}); }),
  };
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::adjacent_find(ids.begin(), ids.end()), ids.end());
}

TEST(ArtifactId, of_no_tensors_is_the_hash_of_nothing) { EXPECT_EQ(artifact_id({}, {}), hash({})); }

TEST(Hasher, pieces_of_any_size_hash_as_the_whole) {
  std::vector<std::byte> bytes(70'001);
  for (size_t at = 0; at < bytes.size(); ++at) bytes[at] = static_cast<std::byte>(at * 131 >> 3);
  for (const HashFunctions* functions : {&hash_sse2, &hash_avx2, &hash_avx512}) {
    if (functions == &hash_avx2 && !__builtin_cpu_supports("avx2")) continue;
    if (functions == &hash_avx512 && !__builtin_cpu_supports("avx512f")) continue;
    for (const size_t piece : {1, 63, 256, 4096, 4099, 70'001}) {
      alignas(64) std::array<std::byte, kHashStateBytes> state;
      functions->begin(state.data());
      for (size_t at = 0; at < bytes.size(); at += piece) {
        functions->add(state.data(), bytes.data() + at, std::min(piece, bytes.size() - at));
      }
      Digest digest;
      functions->end(state.data(), digest.bytes.data());
      EXPECT_EQ(digest, hash(bytes)) << piece;
    }
  }
  Hasher hasher;
  hasher.begin();
  hasher.add(std::span(bytes).first(1000));
  hasher.add(std::span(bytes).subspan(1000));
  EXPECT_EQ(hasher.end(), hash(bytes));
  hasher.begin();
  EXPECT_EQ(hasher.end(), hash({}));
}

}  // namespace tensord::tensor
