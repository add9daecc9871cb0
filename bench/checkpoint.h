// Checkpoints with the shapes of real models and random weights, made once and kept.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "bench/bench.h"
#include "memory/fill_map.h"

namespace tensord::bench {

struct TensorShape {
  std::string name;
  std::vector<uint64_t> shape;  // BF16
  uint64_t size_bytes() const;
};

// The numbers of a config.json that decide the shapes; the defaults are Qwen3-14B's.
struct Qwen {
  uint64_t hidden = 5120;
  uint64_t intermediate = 17408;
  uint64_t queries = 5120;  // heads x head dimension
  uint64_t key_values = 1024;
  uint64_t head_dimension = 128;
  uint64_t layers = 40;
  uint64_t vocabulary = 151936;  // 0: neither embedding nor lm_head
};
std::vector<TensorShape> qwen_shapes(const Qwen& qwen);

// 2 GB: three layers of Qwen3-14B; in tiny mode the same names at a thousandth of the bytes.
Qwen large_qwen(const Bench& bench);

// 1.3 GB, two layers, for what reads the disk; and 8 GB, twelve layers.
Qwen cold_qwen(const Bench& bench);
Qwen huge_qwen(const Bench& bench);

// FOLDER/FILE with these tensors one after another, hot in the page cache (checked: an error when it does not fit
// there). A file of the right size and header is left alone. Returns its path.
Result<std::string> make_checkpoint(const Bench& bench, const std::string& file, std::span<const TensorShape> tensors);

// A file of one matrix [rows, row_elements] over always the same `size_bytes`: what differs from the last call is the
// header alone, so the file stays hot and needs not be written again.
Result<std::string> make_sheet(const Bench& bench, uint64_t size_bytes, uint64_t row_bytes);

// The whole file, mapped for reading.
Result<memory::Mapped> map_file(const std::string& path);

}  // namespace tensord::bench
