// What tests make out of plans: one form for equal plans, and what a plan writes of a window of its target.
#pragma once

#include "tensor/plan.h"

namespace tensord::tensor {

// Drops records that do exactly what another one does or nothing, merges loops, joins contiguous records with equal
// source-to-target distance that overlap or touch, and sorts. Takes plans that were not checked.
CopyPlan canonical(CopyPlan plan);

// What writes bytes [offset, offset + size_bytes) of target memory `target` (clipped to what the plan writes), as a
// plan into one target memory 0 in which `offset` is 0. Rows are cut where the window cuts them. Only checked plans
// without casts (CHECK).
CopyPlan window(const CopyPlan& plan, uint32_t target, uint64_t offset, uint64_t size_bytes);

}  // namespace tensord::tensor
