#include "bench/checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#include "base/bytes.h"
#include "base/fd.h"
#include "base/text.h"

namespace tensord::bench {

namespace {

constexpr uint64_t kElementBytes = 2;
constexpr uint64_t kPageBytes = 4096;

std::string header_of(std::span<const TensorShape> tensors, uint64_t alignment) {
  std::string json = "{";
  uint64_t offset = 0;
  for (const TensorShape& tensor : tensors) {
    json += base::text(json.size() > 1 ? "," : "", "\"", tensor.name, "\":{\"dtype\":\"BF16\",\"shape\":[");
    for (size_t at = 0; at < tensor.shape.size(); ++at) json += base::text(at > 0 ? "," : "", tensor.shape[at]);
    json += base::text("],\"data_offsets\":[", offset, ",", offset + tensor.size_bytes(), "]}");
    offset += tensor.size_bytes();
  }
  json += "}";
  const uint64_t length = base::align_up(json.size() + 8, alignment) - 8;
  json.resize(length, ' ');
  return std::string(reinterpret_cast<const char*>(&length), 8) + json;
}

Status write_all(int fd, const void* data, uint64_t size_bytes, uint64_t offset, const std::string& path) {
  const char* at = static_cast<const char*>(data);
  while (size_bytes > 0) {
    const ssize_t count = ::pwrite(fd, at, size_bytes, static_cast<off_t>(offset));
    if (count < 0) return tl::unexpected(base::errno_error("write " + path, errno));
    at += count;
    offset += static_cast<uint64_t>(count);
    size_bytes -= static_cast<uint64_t>(count);
  }
  return {};
}

// splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators"): any 64-bit state will do.
uint64_t next_random(uint64_t& state) {
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

Status write_random(int fd, uint64_t offset, uint64_t size_bytes, const std::string& path) {
  std::vector<uint64_t> words((1 << 20) / 8);
  uint64_t state = size_bytes;
  for (uint64_t done = 0; done < size_bytes;) {
    for (uint64_t& word : words) word = next_random(state);
    const uint64_t count = std::min<uint64_t>(words.size() * 8, size_bytes - done);
    TRY(write_all(fd, words.data(), count, offset + done, path));
    done += count;
  }
  return {};
}

// Whether the file begins with `header` and has the size that belongs to it.
bool holds(int fd, const std::string& header, uint64_t size_bytes) {
  struct stat status;
  if (::fstat(fd, &status) != 0 || static_cast<uint64_t>(status.st_size) != size_bytes) return false;
  std::string found(header.size(), '\0');
  return base::read_exactly(fd, 0, std::as_writable_bytes(std::span(found)), "") && found == header;
}

// Pages of the file that are not in the page cache, after it was read once.
Result<size_t> read_and_count_missing(const std::string& path) {
  TRY_ASSIGN(const memory::Mapped file, map_file(path));
  const base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  std::vector<std::byte> piece(1 << 20);
  for (uint64_t at = 0; at < file.size_bytes(); at += piece.size()) {
    const uint64_t count = std::min<uint64_t>(piece.size(), file.size_bytes() - at);
    TRY(base::read_exactly(fd.get(), at, std::span(piece).first(count), path));
  }
  std::vector<unsigned char> resident(base::align_up(file.size_bytes(), kPageBytes) / kPageBytes);
  if (::mincore(file.data(), file.size_bytes(), resident.data()) != 0) {
    return tl::unexpected(base::errno_error("ask what is in the page cache of " + path, errno));
  }
  const auto missing = std::count_if(resident.begin(), resident.end(), [](unsigned char page) { return !(page & 1); });
  return static_cast<size_t>(missing);
}

// Until all of it stays: kernels that reclaim idle memory take single pages away again.
Status warm(const std::string& path) {
  constexpr int kTries = 5;
  size_t missing = 0;
  for (int at = 0; at < kTries; ++at) {
    TRY_ASSIGN(missing, read_and_count_missing(path));
    if (missing == 0) return {};
  }
  return base::fail(base::Code::exhausted,
                    base::text(path, ": ", missing, " pages do not stay in the page cache; free some memory"));
}

// Writes what is missing: the bytes when the size is wrong, else the header when it differs.
Result<std::string> make_file(const Bench& bench, const std::string& file, std::span<const TensorShape> tensors,
                              uint64_t header_alignment) {
  const std::string path = bench.options().folder + "/" + file;
  const std::string header = header_of(tensors, header_alignment);
  const uint64_t payload_bytes = std::accumulate(tensors.begin(), tensors.end(), uint64_t{0},
                                                 [](uint64_t sum, const auto& one) { return sum + one.size_bytes(); });
  const base::Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd.valid()) return tl::unexpected(base::errno_error("make " + path, errno));
  if (holds(fd.get(), header, header.size() + payload_bytes)) {
    TRY(warm(path));
    return path;
  }
  struct stat status;
  const bool same_size =
      ::fstat(fd.get(), &status) == 0 && static_cast<uint64_t>(status.st_size) == header.size() + payload_bytes;
  if (!same_size) {
    if (::ftruncate(fd.get(), 0) != 0) return tl::unexpected(base::errno_error("empty " + path, errno));
    TRY(write_random(fd.get(), header.size(), payload_bytes, path));
  }
  TRY(write_all(fd.get(), header.data(), header.size(), 0, path));
  // Writing back later would run beside what is measured.
  if (::fdatasync(fd.get()) != 0) return tl::unexpected(base::errno_error("write back " + path, errno));
  TRY(warm(path));
  return path;
}

}  // namespace

uint64_t TensorShape::size_bytes() const {
  return std::accumulate(shape.begin(), shape.end(), kElementBytes, std::multiplies<uint64_t>());
}

std::vector<TensorShape> qwen_shapes(const Qwen& qwen) {
  std::vector<TensorShape> tensors;
  if (qwen.vocabulary > 0) {
    tensors.push_back({"model.embed_tokens.weight", {qwen.vocabulary, qwen.hidden}});
    tensors.push_back({"lm_head.weight", {qwen.vocabulary, qwen.hidden}});
  }
  for (uint64_t layer = 0; layer < qwen.layers; ++layer) {
    const auto add = [&](const char* part, std::vector<uint64_t> shape) {
      tensors.push_back({base::text("model.layers.", layer, ".", part, ".weight"), std::move(shape)});
    };
    add("input_layernorm", {qwen.hidden});
    add("self_attn.q_proj", {qwen.queries, qwen.hidden});
    add("self_attn.k_proj", {qwen.key_values, qwen.hidden});
    add("self_attn.v_proj", {qwen.key_values, qwen.hidden});
    add("self_attn.o_proj", {qwen.hidden, qwen.queries});
    add("self_attn.q_norm", {qwen.head_dimension});
    add("self_attn.k_norm", {qwen.head_dimension});
    add("post_attention_layernorm", {qwen.hidden});
    add("mlp.gate_proj", {qwen.intermediate, qwen.hidden});
    add("mlp.up_proj", {qwen.intermediate, qwen.hidden});
    add("mlp.down_proj", {qwen.hidden, qwen.intermediate});
  }
  tensors.push_back({"model.norm.weight", {qwen.hidden}});
  return tensors;
}

Qwen large_qwen(const Bench& bench) {
  if (bench.tiny())
    return {.hidden = 160, .intermediate = 544, .queries = 160, .key_values = 32, .layers = 3, .vocabulary = 0};
  return {.layers = 3, .vocabulary = 0};
}

Qwen cold_qwen(const Bench& bench) {
  Qwen qwen = large_qwen(bench);
  qwen.layers = 2;
  return qwen;
}

Qwen huge_qwen(const Bench& bench) {
  Qwen qwen = large_qwen(bench);
  qwen.layers = 12;
  return qwen;
}

Result<std::string> make_checkpoint(const Bench& bench, const std::string& file, std::span<const TensorShape> tensors) {
  return make_file(bench, file, tensors, 8);
}

Result<std::string> make_sheet(const Bench& bench, uint64_t size_bytes, uint64_t row_bytes) {
  const TensorShape matrix{"w", {size_bytes / row_bytes, row_bytes / kElementBytes}};
  // Rows of other widths leave a rest of less than a row: a second tensor keeps the size of the file.
  const uint64_t rest = size_bytes - matrix.size_bytes();
  const TensorShape tensors[] = {matrix, {"rest", {rest / kElementBytes}}};
  return make_file(bench, "sheet.safetensors", tensors, kPageBytes);
}

Result<memory::Mapped> map_file(const std::string& path) {
  const base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return tl::unexpected(base::errno_error("open " + path, errno));
  TRY_ASSIGN(const base::FileIdentity identity, base::identify_file(fd.get(), path));
  void* data = ::mmap(nullptr, identity.size_bytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) return tl::unexpected(base::errno_error("map " + path, errno));
  return memory::Mapped(static_cast<std::byte*>(data), identity.size_bytes);
}

}  // namespace tensord::bench
