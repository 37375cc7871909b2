// What the binding files share: the call counters, and one bind function per op.

#pragma once

#include <pybind11/pybind11.h>

namespace adaptive {

/// Counts one call of a kernel, named "<op>:<device>". The GIL must be held.
void count_call(const char* kernel);

void bind_block_sparse_attention(pybind11::module_& m);
void bind_combine_tokens(pybind11::module_& m);
void bind_decode_attention(pybind11::module_& m);
void bind_exit_confidence(pybind11::module_& m);
void bind_gather_attention(pybind11::module_& m);
void bind_gather_tokens(pybind11::module_& m);
void bind_local_attention(pybind11::module_& m);
void bind_merge_tokens(pybind11::module_& m);
void bind_pool_blocks(pybind11::module_& m);
void bind_prefix_row_ffn(pybind11::module_& m);
void bind_route_tokens(pybind11::module_& m);
void bind_router_scores(pybind11::module_& m);
void bind_score_tokens(pybind11::module_& m);
void bind_select_tokens(pybind11::module_& m);
void bind_skinny_linear(pybind11::module_& m);
void bind_sparse_row_ffn(pybind11::module_& m);
void bind_tree_attention(pybind11::module_& m);
void bind_verify_draft(pybind11::module_& m);
void bind_verify_samples(pybind11::module_& m);

}  // namespace adaptive
