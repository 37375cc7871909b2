"""How many rows the kernel of linear layers takes: by what the processor multiplies itself."""

import pytest
import torch

import adaptive
from adaptive import _native
from adaptive.layers import hf_linear
from adaptive.layers.hf_linear import most_rows


@pytest.mark.skipif(_native.best_cpu_level() == "baseline", reason="counts rows as AVX2 does")
def test_fewer_rows_where_computing_is_slow_or_stock_is_fast(monkeypatch):
    monkeypatch.setattr(hf_linear, "SLOW_DTYPES", frozenset((torch.bfloat16, torch.float16)))
    assert most_rows(torch.float32) == most_rows(torch.bfloat16) == 16
    adaptive.set_cpu_level("baseline")
    assert most_rows(torch.float32) == most_rows(torch.bfloat16) == 4
    adaptive.set_cpu_level(None)
    monkeypatch.setattr(hf_linear, "SLOW_DTYPES", frozenset())
    for tiles in (True, False):
        monkeypatch.setattr(hf_linear, "TILES", tiles)
        dots = adaptive.cpu_level() == "avx512_bf16" and not tiles
        assert most_rows(torch.bfloat16) == (16 if dots else 4)
        assert (most_rows(torch.float32), most_rows(torch.float16)) == (16, 4)
        assert most_rows(torch.bfloat16, widens=True) == 4
