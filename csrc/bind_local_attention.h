// What the bindings of local_attention and its kin share: one kernel, several ways to say which
// keys take part.

#pragma once

#include "bind_attention.h"
#include "local_attention.h"

namespace adaptive {

struct LocalInputs {
  const TensorView& out;
  const TensorView& lse;
  const TensorView& query;
  const TensorView& key;
  const TensorView& value;
  const TensorView& offsets;
  pybind11::handle scale;
  pybind11::handle softcap;
  pybind11::handle causal;
};

/// Checks them, and fills all of LocalAttentionArgs but windows, sinks and lists.
LocalAttentionArgs local_args(const Check& check, const LocalInputs& inputs);

/// Launches on the device of the query.
int64_t run_local(const Check& check, const char* op, const LocalInputs& inputs,
                  const TensorView& workspace, const LocalAttentionArgs& args);

}  // namespace adaptive
