// `tensord show`: what lies in a checkpoint, and what a view of it would copy.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"
#include "cli/verbs.h"
#include "tensor/index.h"

namespace tensord::cli {

// Every tensor and file of `index`. `path` is what the user named. Pure.
Output show_index(const tensor::Index& index, const std::string& path);

// The plan that packs `views` ("w[:, 0:8704]", which parse) row-major one after another into one buffer.
// Pure. Errors as tensor::resolve, and Code::not_found for a name that is not there.
Result<Output> show_views(const tensor::Index& index, const std::string& path,
                          const std::vector<std::string>& views);

}  // namespace tensord::cli
