// XXH3-128 built for one set of vector instructions each; hash() in digest.h picks one. digest_wide.cc is
// compiled for those instructions, so neither it nor this header may use anything inline of the C++
// library: the linker could keep that copy for everybody.
#pragma once

#include <stddef.h>

namespace tensord::tensor {

constexpr size_t kHashStateBytes = 576;

// Canonical (big-endian) digests to `out` (16 bytes), at once or in pieces; `state` is kHashStateBytes at a multiple of
// 64. To be called only on a CPU that has the instructions.
struct HashFunctions {
  void (*whole)(const void* bytes, size_t size_bytes, void* out);
  void (*begin)(void* state);
  void (*add)(void* state, const void* bytes, size_t size_bytes);
  void (*end)(const void* state, void* out);
};
extern const HashFunctions hash_sse2;  // every x86-64 CPU has it
extern const HashFunctions hash_avx2;
extern const HashFunctions hash_avx512;  // needs AVX512F

}  // namespace tensord::tensor
