"""What tests of select_tokens share: its definition by sorting, in exact whole numbers."""

import math
from fractions import Fraction
from functools import lru_cache


@lru_cache(16)
def parts(line):
    """By position, the whole numbers that sums over the scores of ``line`` add up.

    round() of a Fraction takes ties to even. A quotient in double precision is never nearer to a
    tie than the exact one is, unless it is the tie.
    """
    seen = {i: Fraction(score) for i, score in enumerate(line) if score != -math.inf}
    largest = max(seen.values())
    return {i: round(Fraction(float(score / largest * 2**32))) for i, score in seen.items()}


def chosen(line, budget, sinks=0, recent=0, mass=1.0):
    """Positions that select_tokens must choose from the scores of one row and head."""
    seen = [i for i, score in enumerate(line) if score != -math.inf]
    if not seen:
        return []
    sink_end, recent_begin = seen[0] + sinks, len(line) - recent
    forced = [i for i in seen if i < sink_end or i >= recent_begin]
    others = sorted(set(seen) - set(forced), key=lambda i: (-line[i], i))
    wanted = others[: max(0, budget - len(forced))]
    if mass == 1:
        return sorted(forced + wanted)
    if max(line[i] for i in seen) == 0:
        return sorted(forced)
    part = parts(tuple(line))
    need = mass * float(sum(part.values())) - float(sum(part[i] for i in forced))
    kept, held = list(forced), 0
    for i in wanted:
        if held >= need:
            break
        kept.append(i)
        held += part[i]
    return sorted(kept)
