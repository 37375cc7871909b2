// What the bindings of attention ops share: the checks of their common arguments, and the launch on
// the device of the query.

#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <initializer_list>
#include <string>

#include "bindings.h"
#include "check.h"
#include "decode_attention.h"
#include "tensor_view.h"
#ifdef ADAPTIVE_CUDA
#include "cuda/device.h"
#endif

namespace adaptive {

/// Arguments that every attention op has. `value` is not given where only keys are read.
struct AttentionInputs {
  const TensorView& query;
  const TensorView& key;
  const TensorView* value;
  const TensorView& lengths;
  const TensorView& mask;
  pybind11::handle scale;
  pybind11::handle softcap;
  pybind11::handle causal;
  const TensorView* cache_rows = nullptr;  // of decode_attention alone
};

/// Checks them, and fills all of DecodeAttentionArgs but out, lse and workspace.
DecodeAttentionArgs attention_args(const Check& check, const AttentionInputs& inputs);

/// Checks an output of float32 whose sizes are known, on the device of `like`.
void check_output(const Check& check, const TensorView& output, const char* name,
                  std::initializer_list<int64_t> sizes, const TensorView& like);

/// Checks `out`, unless the op has none, and `lse`, and puts them into `args`.
void set_attention_outputs(const Check& check, const TensorView* out, const TensorView& lse,
                           const TensorView& query, DecodeAttentionArgs& args);

/// The factor on scores; None: one over the root of head_dim.
float check_scale(const Check& check, pybind11::handle scale, int64_t head_dim);

float check_softcap(const Check& check, pybind11::handle softcap);

/// Query heads are a multiple of KV heads.
void check_grouping(const Check& check, int64_t heads, int64_t kv_heads);

/// Checks the size of the last of four axes.
void check_head_dim(const Check& check, const TensorView& view, const char* name);

/// Checks `lengths` and returns its data; null if it is not given.
const int32_t* check_lengths(const Check& check, const TensorView& lengths, int64_t batch,
                             int64_t capacity, const TensorView& like);

/// Checks `rows`, [batch] in 0..cache_batch - 1 (on CUDA the kernel looks for itself), and returns
/// its data.
const int64_t* check_cache_rows(const Check& check, const TensorView& rows, int64_t batch,
                                int64_t cache_batch, const TensorView& like);

/// Where rows are cut into sequences.
struct Cuts {
  const int32_t* offsets;  // [batch, count]; null: not given
  int64_t stride;          // batch
  int64_t count;
};

/// Checks that the offsets of every row ascend in 0..tokens (on CUDA the kernel looks for itself).
Cuts check_offsets(const Check& check, const TensorView& offsets, int64_t batch, int64_t tokens,
                   const TensorView& like);

/// Lists of chosen keys or pages.
struct Choice {
  const int32_t* indices;     // [batch, kv_heads, chosen]
  int64_t indices_stride[2];  // batch, head
  const int32_t* counts;      // [batch, kv_heads]
  int64_t counts_stride[2];   // batch, head
  int64_t chosen;
};

/// Checks that every list ascends within 0..entries - 1 (on CUDA the kernel looks for itself).
Choice check_choice(const Check& check, const TensorView& indices, const TensorView& counts,
                    int64_t batch, int64_t kv_heads, int64_t entries, const TensorView& like);

/// Checks the list of one row and head: first whether all is well, then what is not. Messages place
/// it at [place, head].
void check_list(const Check& check, const Choice& choice, int64_t row, int64_t head,
                int64_t entries, const std::string& place);

void set_strides(const TensorView& view, int64_t (&strides)[3]);

/// Runs `cpu()`, or `cuda(workspace, bytes, stream)` if that is where `like` lies. Returns 0; or
/// the bytes of workspace that the op must be called again with, of which `wanted()` tells.
template <class Cpu, class Wanted, class Cuda>
int64_t launch(const Check& check, const char* op, const TensorView& like, const char* name,
               [[maybe_unused]] const TensorView& workspace, Cpu&& cpu,
               [[maybe_unused]] Wanted&& wanted, [[maybe_unused]] Cuda&& cuda) {
  namespace py = pybind11;
  if (like.tensor.device.type == dlpack::kCpu) {
    count_call((std::string(op) + ":cpu").c_str());
    const py::gil_scoped_release release;
    cpu();
    return 0;
  }
#ifdef ADAPTIVE_CUDA
  if (like.tensor.device.type == dlpack::kCuda) {
    const cuda::DeviceGuard guard(like.tensor.device.id);
    const int64_t bytes = wanted();
    int64_t given = 0;
    void* memory = nullptr;
    if (workspace.given()) {
      check.tensor(workspace, "workspace", 1);
      check.same_device(workspace, "workspace", like);
      memory = workspace.data<void>();
      given = workspace.numel() * workspace.tensor.dtype.bits / 8;
    }
    if (given < bytes) return bytes;
    void* stream = nullptr;
    const auto& device = like.tensor.device;
    if (like.api->current_stream(device.type, device.id, &stream) != 0) {
      throw py::error_already_set();
    }
    count_call((std::string(op) + ":cuda").c_str());
    const py::gil_scoped_release release;
    cuda(memory, given, static_cast<Stream>(stream));
    return 0;
  }
#endif
  check.no_kernel(like, name);
}

}  // namespace adaptive
