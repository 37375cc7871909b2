"""decode_attention against float64: edges, random inputs, hostile values, memory, threads."""

import math
import mmap
import sys
import threading

import pytest
import torch
from decode_cases import BF16, EDGES, EPS, F16, LAYOUTS, MASKS, Case, assert_accurate, exact
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import decode_attention

F32 = torch.float32
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_edges(case, device):
    assert_accurate(decode_attention, case.arguments(device))


@given(
    st.builds(
        Case,
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 9),
        query_tokens=st.sampled_from([1, 1, 2, 3, 8, 16]),
        capacity=st.one_of(st.integers(1, 140), st.integers(1000, 1200)),
        head_dim=st.integers(4, 32).map(lambda step: 8 * step),
        lengths=st.sampled_from([None, "ragged"]),
        mask=st.sampled_from(MASKS),
        layout=st.sampled_from(LAYOUTS),
        scale=st.sampled_from([None, 0.3]),
        softcap=st.sampled_from([0.0, 0.0, 3.0]),
        causal=st.booleans(),
        dtype=st.sampled_from([F32, BF16, F16]),
        seed=st.integers(0, 2**16),
    )
)
def test_random_inputs(device, case):
    assert_accurate(decode_attention, case.arguments(device))


def test_what_no_query_sees_is_zero_and_minus_infinity(device):
    none = torch.zeros(130, dtype=torch.bool)
    for mask in (none, torch.full((130,), -INF)):
        arguments = Case(capacity=130, query_tokens=3).arguments(device)
        out, lse = decode_attention(**{**arguments, "mask": mask.to(device)})
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, torch.full_like(lse, -INF))


def test_a_masked_row_leaves_its_neighbours_alone(device):
    arguments = Case(batch=3, capacity=130, dtype=BF16).arguments(device)
    expected, expected_lse = decode_attention(**arguments)
    mask = torch.ones(3, 1, 1, 130, dtype=torch.bool, device=device)
    mask[1] = False
    out, lse = decode_attention(**{**arguments, "mask": mask})
    assert torch.equal(out[::2], expected[::2])
    assert torch.equal(lse[::2], expected_lse[::2])
    assert not out[1].any()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("position", [0, 63, 64, 1029])
def test_the_last_and_any_other_key_counts(device, dtype, position):
    """A key that outweighs all others decides the result, wherever it stands."""
    arguments = Case(batch=1, capacity=1030, dtype=dtype).arguments(device)
    query = torch.ones_like(arguments["query"])
    arguments["key"][:, :, position] = 20
    out, _ = decode_attention(**{**arguments, "query": query})
    expected = arguments["value"][:, :, position].float().repeat_interleave(4, 1)
    torch.testing.assert_close(out[:, :, 0], expected, rtol=0, atol=1e-6)


def test_nan_in_a_seen_key_or_value_reaches_only_its_row(device):
    for name in ("key", "value"):
        arguments = Case(batch=2, capacity=100).arguments(device)
        expected, _ = decode_attention(**arguments)
        arguments[name][0, 1, 50] = NAN
        out, lse = decode_attention(**arguments)
        assert out[0, 4:].isnan().all()
        assert lse[0, 4:].isnan().all() == (name == "key")
        assert torch.equal(out[0, :4], expected[0, :4])
        assert torch.equal(out[1], expected[1])


def test_infinite_scores_follow_pytorch(device):
    """+inf gives NaN, as softmax does; -inf is no weight, unless nothing else is left."""
    arguments = Case(batch=1, kv_heads=1, group=1, capacity=3, head_dim=32).arguments(device)
    for bias, expected in (
        ([INF, 0, 0], [NAN] * 3),
        ([0, NAN, 0], [NAN] * 3),
        ([-INF, 0, -INF], [0, 1, 0]),
        ([-3e38, -3e38, -3e38], [1 / 3] * 3),
    ):
        value = torch.zeros(1, 1, 3, 32, device=device)
        value[0, 0, :, :3] = torch.eye(3)
        mask = torch.tensor([bias], device=device)
        out, _ = decode_attention(**{**arguments, "value": value, "mask": mask, "scale": 0.0})
        torch.testing.assert_close(
            out[0, 0, 0, :3].cpu(), torch.tensor(expected).float(), equal_nan=True
        )


def test_scores_of_one_key_are_the_log_sum(device):
    """With one key lse is the score itself: tanh and scale to a few roundings."""
    scores = torch.cat([torch.linspace(-200, 200, 801), torch.logspace(-30, 2, 200)])
    query = torch.zeros(len(scores), 1, 1, 32, device=device)
    query[:, 0, 0, 7] = scores
    key = torch.zeros(len(scores), 1, 1, 32, device=device)
    key[..., 7] = 1
    for softcap in (0.0, 30.0):
        _, lse = decode_attention(query, key, key, scale=1.5, softcap=softcap)
        right = 1.5 * scores.double()
        right = softcap * torch.tanh(right / softcap) if softcap else right
        error = (lse.flatten().cpu() - right).abs()
        assert (error <= 4 * EPS * right.abs()).all()


def test_weights_follow_exp_over_its_whole_range(device):
    """Two keys, scores 0 and x: the second weighs exp(x) times the first, down to exactly 0."""
    x = torch.cat([torch.linspace(-86, 0, 3001), torch.tensor([-90.0, -200.0, -1e30, -INF])])
    mask = torch.zeros(len(x), 1, 1, 2, device=device)
    mask[:, 0, 0, 1] = x
    query = torch.zeros(len(x), 1, 1, 32, device=device)
    value = torch.zeros(len(x), 1, 2, 32, device=device)
    value[:, 0, 0, 0] = value[:, 0, 1, 1] = 1
    out, _ = decode_attention(query, torch.zeros_like(value), value, mask=mask)
    ratio = (out[:, 0, 0, 1].double() / out[:, 0, 0, 0].double()).cpu()
    right = torch.exp(x.double())
    assert ((ratio - right).abs() <= 4 * EPS * right)[:3001].all()
    assert not ratio[3001:].any()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_16_bit_value_is_converted_exactly(device, dtype):
    value = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    value = value.view(256, 1, 1, 256).to(device)
    out, _ = decode_attention(torch.zeros_like(value), torch.zeros_like(value), value)
    torch.testing.assert_close(out, value.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
def test_offsets_beyond_31_bits():
    """Rows 2^30 elements apart in memory that is mapped, but hardly resident."""
    stride = 2**30 + 64
    no_reserve = 0x4000  # MAP_NORESERVE of Linux; the mmap module has it from Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * (3 * stride + 64), flags=flags)
    whole = torch.frombuffer(memory, dtype=BF16)
    dense = Case(batch=1, kv_heads=1, capacity=4, dtype=BF16).arguments()
    far = {}
    for name in ("key", "value"):
        far[name] = whole.as_strided((1, 1, 4, 64), (4 * stride, 4 * stride, stride, 1))
        far[name].copy_(dense["key"])
    out, lse = decode_attention(**{**dense, **far})
    expected, expected_lse = decode_attention(**{**dense, "value": dense["key"]})
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_python_threads_and_openmp_threads_change_no_bit():
    arguments = Case(batch=2, capacity=3000, lengths=(3000, 1700), dtype=BF16).arguments()
    expected, expected_lse = decode_attention(**arguments)
    before = torch.get_num_threads()
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(20):
                out, lse = decode_attention(**arguments)
                if not (torch.equal(out, expected) and torch.equal(lse, expected_lse)):
                    wrong.append(out)

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, lse = decode_attention(**arguments)
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)
        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


def test_the_oracle_agrees_with_softmax_attention():
    """The float64 oracle itself, against torch's attention where that has the same meaning."""
    arguments = Case(mask="add", query_tokens=3, causal=False, capacity=40).arguments()
    out, _ = exact(**arguments)
    query, mask = arguments["query"].double(), arguments["mask"].double()
    key, value = (arguments[n].nan_to_num().double() for n in ("key", "value"))
    stock = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(out, stock.nan_to_num())


def test_a_call_with_little_shared_memory_leaves_other_threads_theirs(device):
    """On CUDA the limit belongs to the kernel, not to the thread that set it."""
    sizes = {"head_dim": 256, "dtype": BF16, "query_tokens": 16}
    much, little = Case(group=1, **sizes), Case(group=4, **sizes)  # 206 and 165 KiB on an H100

    def call(case):
        with torch.no_grad():
            assert_accurate(decode_attention, case.arguments(device))

    call(much)
    other = threading.Thread(target=call, args=(little,))
    other.start()
    other.join()
    call(much)
