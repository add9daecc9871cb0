// What packing slices of a checkpoint would copy, as JSON. Pure.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"
#include "tensor/index.h"

namespace tensord::client {

// The JSON of tensord_plan. Code::invalid_argument for a view that cannot be read or does not fit its tensor,
// Code::not_found for a name that is not there.
base::Result<std::string> plan_json(const tensor::Index& index, const std::vector<std::string>& views);

}  // namespace tensord::client
