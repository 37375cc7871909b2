// verify_draft on the CPU.

#include "verify_draft.h"

#include <algorithm>

namespace adaptive::cpu {

void verify_draft(const VerifyDraftArgs& args) {
  const int64_t width = args.nodes + 1;
  for (int64_t row = 0; row < args.batch; ++row) {
    const int64_t* drafted = args.drafted + row * args.drafted_stride;
    const int64_t* choices = args.choices + row * args.choices_stride;
    const int64_t* parents = args.parents ? args.parents + row * args.nodes : nullptr;
    const int64_t length = args.lengths ? args.lengths[row] : args.nodes;
    int64_t* path = args.path + row * width;
    int64_t* tokens = args.tokens + row * width;
    std::fill_n(path, width, -1);
    std::fill_n(tokens, width, -1);

    int64_t accepted = 0, here = -1, choice = choices[0];
    for (int64_t node = 0; node < length; ++node) {  // what follows a node comes after it
      const int64_t parent = parents ? parents[node] : node - 1;
      if (parent != here || drafted[node] != choice) continue;
      path[accepted] = here = node;
      tokens[accepted++] = choice;
      choice = choices[node + 1];
    }
    tokens[accepted] = choice;
    args.accepted[row] = accepted;
  }
}

}  // namespace adaptive::cpu
