// What tests make out of plans: one form for equal plans, whether they write everything, and what a plan writes of a
// window of its target.
#pragma once

#include "tensor/plan.h"

namespace tensord::tensor {

// Drops records that do exactly what another one does or nothing, merges loops, joins contiguous records with equal
// source-to-target distance that overlap or touch, and sorts. Takes plans that were not checked.
CopyPlan canonical(CopyPlan plan);

// Code::invalid_argument when a plan that check_plan accepts leaves bytes of its target unwritten: it writes no byte
// twice, so that the amounts tell.
Status check_complete(const CopyPlan& plan, uint64_t target_bytes);

// What writes bytes [offset, offset + size_bytes) of the target (clipped to what the plan writes), as a plan into a
// target in which `offset` is 0. Rows are cut where the window cuts them. Only checked plans
// without casts (CHECK).
CopyPlan window(const CopyPlan& plan, uint64_t offset, uint64_t size_bytes);

}  // namespace tensord::tensor
