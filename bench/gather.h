// What a load_into is raced against: the same rows, copied by a loop written by hand.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bench/checkpoint.h"
#include "bench/measure.h"
#include "client/model.h"

namespace tensord::bench {

// Rows of one slice, from the mapping of a model into memory of our own.
struct Rows {
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  uint64_t row_bytes = 0;
  uint64_t row_count = 0;
  uint64_t source_pitch = 0;
  uint64_t target_pitch = 0;
  uint64_t bytes() const { return row_bytes * row_count; }
};

// Rows of 2-D slices, cut into pieces of about 1 MiB that threads take one by one.
void cut_rows(const Rows& rows, std::vector<Rows>& pieces);
// The loops by hand; which one is fastest depends on the rows and on the machine.
std::span<const char* const> row_loops();
Sample run_row_loop(std::span<const Rows> pieces, size_t loop, int thread_count);

// Memory of our own, touched.
Result<memory::Mapped> make_memory(uint64_t size_bytes);

// The rectangle [row_begin, row_begin + row_count) x [column_begin, column_begin + column_count) of a matrix (of a
// vector: one row), and where it goes.
struct Slice {
  std::string name;
  uint64_t row_begin = 0, row_count = 0;
  uint64_t column_begin = 0, column_count = 0;
};

// What `rank` of `rank_count` tensor-parallel ranks holds of the tensors of qwen_shapes.
enum class Part { all, columns };
std::vector<Slice> rank_slices(std::span<const TensorShape> tensors, uint64_t rank_count, uint64_t rank, Part part);

// Bytes of the slices packed.
uint64_t packed_bytes(std::span<const Slice> slices);

// A tensord_copy and what it points to.
struct CopyOrder {
  const tensor::Tensor* tensor = nullptr;
  std::vector<tensord_index_item> items;  // empty: the whole tensor
  std::byte* target = nullptr;
  tensor::Dtype dtype = tensor::Dtype::bf16;
  std::vector<uint64_t> shape;
  std::vector<int64_t> strides = {};  // empty: row-major
  tensord_copy raw() const;           // valid as long as this stays where it is
};
tensord_index_item range(uint64_t begin, uint64_t count);

// Slices of one model, packed one after another into memory that is touched, as orders for load_into and as rows for
// the loop.
class Gather {
 public:
  // `target`: memory of packed_bytes, of our own where it is left out; the model's bytes are touched then, too. With a
  // target of the caller's, the model may still fill.
  static Result<Gather> make(std::shared_ptr<client::Model> model, const std::vector<Slice>& slices,
                             memory::Mapped target = {});

  uint64_t bytes() const { return target_.size_bytes(); }
  // By load_into, with as many threads as it likes.
  Result<Sample> run_product();
  // By hand, with as many threads as load_into last used.
  Sample run_loop(size_t loop) const;
  // Runs the product over a target of other bytes and compares each byte with the file's.
  Status check(const std::string& path);

  // One for each loop.
  std::vector<Contender> loops() const;

  const client::LoadReport& last_report() const { return last_report_; }

 private:
  std::shared_ptr<client::Model> model_;
  memory::Mapped target_;
  std::vector<CopyOrder> orders_;
  std::vector<tensord_copy> copies_;  // the orders, raw
  std::vector<Rows> rows_;
  std::vector<Rows> pieces_;
  client::LoadReport last_report_;
};

// The product and the loops in turns, after a check of every byte.
Result<Figure> race_gather(const Bench& bench, Gather& gather, std::string name, const std::string& path,
                           std::span<const Contender> peers = {});

// Copies past the caches where this machine can and the target is aligned to 64 bytes, else as memcpy does.
void stream(std::byte* target, const std::byte* source, uint64_t size_bytes);

// Reads a byte of every page, so that no fault is left to be timed.
void touch(const std::byte* data, uint64_t size_bytes);

}  // namespace tensord::bench
