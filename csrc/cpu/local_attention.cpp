// local_attention and block_sparse_attention on the CPU.

#include "local_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace adaptive::cpu {
namespace {
float at(const void* p, int64_t i, DType t) {
  if (t == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t b = static_cast<const uint16_t*>(p)[i];
  if (t == DType::kFloat16) { _Float16 h; __builtin_memcpy(&h, &b, 2); return static_cast<float>(h); }
  const uint32_t w = uint32_t{b} << 16; float f; __builtin_memcpy(&f, &w, 4); return f;
}
void put(void* p, int64_t i, DType t, float x) {
  if (t == DType::kFloat32) { static_cast<float*>(p)[i] = x; return; }
  uint16_t b;
  if (t == DType::kFloat16) { const _Float16 h = static_cast<_Float16>(x); __builtin_memcpy(&b, &h, 2); }
  else { uint32_t w; __builtin_memcpy(&w, &x, 4); b = static_cast<uint16_t>((w + 0x7fff + ((w >> 16) & 1)) >> 16); }
  static_cast<uint16_t*>(p)[i] = b;
}
}  // namespace

// TEMPORARY: correct and slow; the tiled kernel takes its place.
void local_attention(const LocalAttentionArgs& a) {
  const int64_t group = a.heads / a.kv_heads;
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < a.batch * a.heads * a.query_tokens; ++i) {
    const int64_t t = i % a.query_tokens, h = i / a.query_tokens % a.heads;
    const int64_t b = i / a.query_tokens / a.heads, kvh = h / group;
    const int64_t p = a.tokens - a.query_tokens + t;
    int64_t first = 0, last = a.tokens;
    if (a.offsets) {
      const int32_t* cuts = a.offsets + b * a.offsets_stride;
      first = last = 0;
      for (int64_t c = 0; c + 1 < a.cuts; ++c)
        if (cuts[c] <= p && p < cuts[c + 1]) { first = cuts[c]; last = cuts[c + 1]; }
    }
    if (a.causal) last = std::min(last, p + 1);
    const int64_t window = a.windows ? a.windows[h] : a.window;
    const int64_t list = a.counts && a.lists == a.heads ? h : kvh;
    std::vector<float> s; std::vector<int64_t> ks;
    for (int64_t k = first; k < last; ++k) {
      if (!(std::abs(p - k) < window || k < first + a.sinks)) continue;
      if (a.counts) {
        const int64_t qb = t / a.block_size;
        const int32_t n = a.counts[b * a.counts_stride[0] + list * a.counts_stride[1] + qb * a.counts_stride[2]];
        const int32_t* l = a.blocks + b * a.blocks_stride[0] + list * a.blocks_stride[1] + qb * a.blocks_stride[2];
        if (!std::binary_search(l, l + n, static_cast<int32_t>(k / a.block_size))) continue;
      }
      float dot = 0;
      for (int64_t d = 0; d < a.head_dim; ++d)
        dot += at(a.query, b * a.query_stride[0] + h * a.query_stride[1] + t * a.query_stride[2] + d, a.dtype) *
               at(a.key, b * a.key_stride[0] + kvh * a.key_stride[1] + k * a.key_stride[2] + d, a.dtype);
      dot *= a.scale;
      if (a.softcap > 0) dot = a.softcap * std::tanh(dot / a.softcap);
      s.push_back(dot); ks.push_back(k);
    }
    const float m = s.empty() ? 0 : *std::max_element(s.begin(), s.end());
    float sum = 0;
    std::vector<float> o(a.head_dim);
    for (size_t j = 0; j < s.size(); ++j) {
      const float w = std::exp(s[j] - m); sum += w;
      for (int64_t d = 0; d < a.head_dim; ++d)
        o[d] += w * at(a.value, b * a.value_stride[0] + kvh * a.value_stride[1] + ks[j] * a.value_stride[2] + d, a.dtype);
    }
    for (int64_t d = 0; d < a.head_dim; ++d)
      put(a.out, b * a.out_stride[0] + h * a.out_stride[1] + t * a.out_stride[2] + d, a.dtype, sum > 0 ? o[d] / sum : 0);
    a.lse[i] = m + std::log(sum);
  }
}
}  // namespace adaptive::cpu
