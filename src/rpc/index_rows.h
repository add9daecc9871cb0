// An Index as it crosses processes: the table IndexRows in a sealed memfd.
#pragma once

#include <cstdint>

#include "base/fd.h"
#include "base/result.h"
#include "tensor/index.h"

namespace tensord::rpc {

using base::Result;

// Sealed against every change. Thread safe.
Result<base::Fd> encode_index(const tensor::Index& index);

// Code::corrupt when the descriptor is no sealed memfd of `size_bytes` or the table in it makes no sense.
Result<tensor::Index> decode_index(const base::Fd& fd, uint64_t size_bytes);

}  // namespace tensord::rpc
