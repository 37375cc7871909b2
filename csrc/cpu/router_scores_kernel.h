// What router_scores.cpp asks of one instruction set. Included by every instruction set's file:
// nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "router_scores.h"

namespace adaptive::cpu {

/// Elements of the largest load_pair of an instruction set: routers are padded to a multiple of it.
constexpr int64_t kRouterStep = 32;

/// What the sums over one hidden state give.
struct RouterSums {
  float product;  // with the router, and the norm's weight
  float squares;  // of the hidden state; undefined without a norm
};

/// The kernels of one instruction set.
struct RouterKernel {
  /// Writes the router, the norm's weight in it, in the order that `sum` reads; zeros behind it.
  void (*prepare)(const RouterScoresArgs& args, float* router);
  /// Sums over tokens [begin, end), counted over all rows.
  void (*sum)(const RouterScoresArgs& args, const float* router, int64_t begin, int64_t end,
              RouterSums* sums);
};

RouterKernel router_kernel_base();
RouterKernel router_kernel_avx2();
RouterKernel router_kernel_avx512();

}  // namespace adaptive::cpu
