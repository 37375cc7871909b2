// What the bindings of ops on skinny_linear's product share: the checks of its arguments.

#pragma once

#include "check.h"
#include "skinny_linear.h"
#include "tensor_view.h"

namespace adaptive {

/// Checks them, messages calling the input `name`, and fills all of SkinnyLinearArgs but out.
SkinnyLinearArgs linear_args(const Check& check, const TensorView& input, const char* name,
                             const TensorView& weight, const TensorView& bias,
                             const TensorView& weight_scales);

}  // namespace adaptive
