// XXH3-128 built for one set of vector instructions each; hash() in digest.h picks one. Their .cc files are
// compiled for those instructions, so neither they nor this header may use anything inline of the C++
// library: the linker could keep that copy for everybody.
#pragma once

#include <stddef.h>

namespace tensord::tensor {

// Canonical (big-endian) digest of `size_bytes` bytes to `out` (16 bytes). To be called only on a CPU that
// has them.
using HashFunction = void(const void* bytes, size_t size_bytes, void* out);
// The same in pieces; `state` is kHashStateBytes at a multiple of 64.
constexpr size_t kHashStateBytes = 576;
struct HashFunctions {
  HashFunction* whole;
  void (*begin)(void* state);
  void (*add)(void* state, const void* bytes, size_t size_bytes);
  void (*end)(const void* state, void* out);
};
extern const HashFunctions hash_sse2;  // every x86-64 CPU has it
extern const HashFunctions hash_avx2;
extern const HashFunctions hash_avx512;  // needs AVX512F

}  // namespace tensord::tensor
