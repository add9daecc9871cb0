// Selection: which tensors of an index are meant, and how many of them are read at once. Pure.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "tensor/index.h"

namespace tensord::tensor {

// The most names and patterns of one selection, and how many of them may be patterns: each is tried on every name.
inline constexpr size_t kOnlyCountMax = 100'000;
inline constexpr size_t kPatternCountMax = 1000;
// The most tensors of one batch, so that its names are a selection.
inline constexpr size_t kBatchTensorsMax = 10'000;

// Shell-style: * any bytes, ? one byte, [a-z0] one of them, [!a-z] none of them. Takes time of pattern times name.
bool matches(std::string_view pattern, std::string_view name);

// Positions in index.tensors of what `only` names, rising, once each. A text that is the name of a tensor means that
// tensor alone; any other one is a pattern. Code::not_found, with the nearest name, for the first that matches nothing.
Result<std::vector<uint32_t>> select(const Index& index, std::span<const std::string> only);

// The index of these tensors: files and metadata stay. `positions` as select returns them.
Index take(const Index& index, std::span<const uint32_t> positions);

// "; did you mean 'x'?" for names that are nearly right, else nothing.
std::string suggestion(const Index& index, std::string_view name);

// The number of each tensor's batch, counted in file order: consecutive tensors of at most `batch_bytes` together, or one
// that is larger. Depends on nothing else, so that processes that read parts of one index cut it equally.
std::vector<uint32_t> batch_numbers(const Index& index, uint64_t batch_bytes);

}  // namespace tensord::tensor
