"""What policies make of a model, alone and together: the map, and combinations without meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.policy import (
    Exact,
    ModelShape,
    Plan,
    Quest,
    RazorAttention,
    StreamingLLM,
    TidalDecode,
)

HEADS = ((2, 0), (3, 1), (4, 0), (4, 1))


def shape(layers=6, windows=()):
    return ModelShape(
        model_type="llama",
        heads=(4,) * layers,
        kv_heads=(2,) * layers,
        head_dim=(64,) * layers,
        windows=windows,
    )


def tidal(**fields):
    return TidalDecode(**{"select_layers": (2, 4), **fields})


def razor(**fields):
    return RazorAttention(**{"heads": HEADS, **fields})


def signs(policies, of=None):
    """One string of signs per layer."""
    plan = Plan.make(of or shape(), policies)
    sign = dict(dense="#", stock=".", select="S", reuse="r", pages="p", window="w", razor="z")
    return ["".join(sign[mode] for mode in row) for row in plan.rows]


MAPS = {
    "tidal": ([tidal()], "## ## SS rr SS rr"),
    "one select layer": ([tidal(select_layers=(3,))], "## ## ## SS rr rr"),
    "dense between": ([tidal(dense_layers=(0, 3))], "## ## SS ## SS rr"),
    "quest": ([Quest()], "## ## pp pp pp pp"),
    "streaming": ([StreamingLLM()], "ww ww ww ww ww ww"),
    "some streaming": ([StreamingLLM(layers=(1, 5))], "## ww ## ## ## ww"),
    "razor": ([razor()], "## ## #z z# ## zz"),
    "razor without compensation": ([razor(compensation=False)], "## ## #w w# ## ww"),
    "razor everywhere": ([razor(dense_layers=())], "zz zz #z z# ## zz"),
    "tidal x razor": ([tidal(), razor()], "## ## SS zr SS zz"),
    "razor x tidal": ([razor(), tidal()], "## ## SS zr SS zz"),
    "quest x razor": ([Quest(), razor()], "## ## pz zp pp zz"),
    "tidal x some streaming": ([tidal(), StreamingLLM(layers=(5,))], "## ## SS rr SS ww"),
    "some streaming x tidal": ([StreamingLLM(layers=(2, 3)), TidalDecode()], "## ## ww ww SS rr"),
    "stock and tidal": ([Exact(stock_layers=(0, 3)), tidal()], ".. ## SS .. SS rr"),
    "stock and razor": ([Exact(stock_layers=(2,)), razor()], "## ## .. z# ## zz"),
    "stock and streaming": ([Exact(stock_layers=(2,)), StreamingLLM()], "ww ww .. ww ww ww"),
}


@pytest.mark.parametrize("case", MAPS)
def test_maps(case):
    policies, expected = MAPS[case]
    assert signs(policies) == expected.split()


def test_a_plan_prints_as_a_map_with_its_legend():
    assert str(Plan.make(shape(), [tidal(), razor()])).splitlines() == [
        "plan for llama: 6 layers x KV heads",
        "      0-1  ##",
        "        2  SS",
        "        3  zr",
        "        4  SS",
        "        5  zz",
        "        #  dense: reads every key, native kernel",
        "        S  select: reads every key, and chooses some for the layers below it",
        "        r  reuse: reads the keys that the last select layer chose",
        "        z  razor: keeps first and recent tokens, and one that stands for all others",
    ]


@pytest.mark.parametrize(
    ("layers", "expected"), [(32, (2, 13)), (28, (2, 11)), (16, (2, 6)), (8, (2, 4)), (5, (2,))]
)
def test_select_layers_without_calibration(layers, expected):
    rows = Plan.make(shape(layers), [TidalDecode()]).rows
    assert tuple(i for i, row in enumerate(rows) if row[0] == "select") == expected
    assert all(row[0] == "reuse" for i, row in enumerate(rows) if i > 2 and i not in expected)


WINDOWS = (None, None, 128, None, 128, None)


def test_layers_with_a_window_of_their_own_stay_dense():
    own = shape(windows=WINDOWS)
    assert signs([TidalDecode(dense_layers=(0,), select_layers=(1,))], own) == (
        ["##", "SS", "##", "rr", "##", "rr"]
    )
    assert signs([Quest()], own) == ["##", "##", "##", "pp", "##", "pp"]
    assert signs([StreamingLLM()], own) == ["ww", "ww", "##", "ww", "##", "ww"]
    assert signs([razor()], own) == ["##", "##", "##", "z#", "##", "zz"]
    assert signs([Exact()], own) == ["##"] * 6


REFUSED = {
    "two choices": (
        [tidal(), Quest()],
        "Quest and TidalDecode cannot be combined: both choose the",
    ),
    "two choices, turned": ([Quest(), tidal()], "TidalDecode and Quest cannot be combined"),
    "two windows": ([razor(), StreamingLLM()], "StreamingLLM and RazorAttention .* the window"),
    "twice": ([tidal(), tidal()], "a second TidalDecode cannot be combined"),
    "correction and razor": (
        [tidal(correct_every=64), razor()],
        r"TidalDecode.correct_every must be None together with RazorAttention.*got 64",
    ),
    "razor and correction": ([razor(), tidal(correct_every=64)], "correct_every must be None"),
    "correction and streaming": (
        [tidal(correct_every=64), StreamingLLM(layers=(5,))],
        "correct_every must be None together with StreamingLLM",
    ),
    "streaming everywhere": (
        [tidal(), StreamingLLM()],
        "StreamingLLM.layers must name the layers that TidalDecode shall leave to it, got None",
    ),
    "streaming a select layer": (
        [tidal(), StreamingLLM(layers=(4,))],
        "StreamingLLM.layers must leave out a layer: it selects keys for later layers, got 4",
    ),
    "selecting a streaming layer": (
        [StreamingLLM(layers=(4,)), tidal()],
        "TidalDecode.select_layers must leave out a layer: StreamingLLM drops its keys, got 4",
    ),
    "selecting a stock layer": (
        [Exact(stock_layers=(2,)), tidal()],
        "select_layers must leave out a layer: Exact leaves that layer to the model's own.*got 2",
    ),
    "streaming a stock layer": (
        [Exact(stock_layers=(5,)), StreamingLLM(layers=(5,))],
        "layers must leave out a layer: Exact leaves",
    ),
    "exact last": ([tidal(), Exact()], "Exact must come before TidalDecode, whose layers"),
    "no such layer": ([tidal(select_layers=(2, 6))], r"must be below the model's 6 layers, got 6"),
    "no such dense layer": ([tidal(dense_layers=(0, 9))], "below the model's 6 layers, got 9"),
    "no such quest layer": ([Quest(dense_layers=(6,))], "Quest.dense_layers must be below"),
    "no such streaming layer": ([StreamingLLM(layers=(6,))], "StreamingLLM.layers must be below"),
    "no such razor layer": ([razor(dense_layers=(6,))], "RazorAttention.dense_layers must be"),
    "nothing left": ([TidalDecode(dense_layers=(0, 1, 2, 3, 4))], "leave one layer that selects"),
    "nothing left for quest": ([Quest(dense_layers=tuple(range(6)))], "leave a layer that may"),
    "heads not known": (
        [RazorAttention()],
        r"calibrate first: adaptive.calibrate\(model, RazorAttention\(...\)\)",
    ),
    "no such head": (
        [razor(heads={5: [2]})],
        r"heads must be of the 2 KV heads of layer 5, got \(5, 2\)",
    ),
    "heads of a deeper model": (
        [razor(heads={6: [0]})],
        r"heads must be of the model's 6 layers, got \(6, 0\)",
    ),
    "of another depth": (
        [razor(of_layers=32)],
        "heads must be for a model with 6 layers, got 32 layers",
    ),
    "of another width": (
        [razor(of_heads=8)],
        "heads must be for a model with 2 KV heads, got 8 KV heads",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combinations_without_meaning_are_refused_with_the_reason(case):
    policies, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Plan.make(shape(), policies)


def test_what_a_model_with_windows_refuses():
    own = shape(windows=WINDOWS)
    with pytest.raises(ValueError, match="gives that layer a window of 128 tokens, got 2"):
        Plan.make(own, [tidal()])
    with pytest.raises(ValueError, match="correct_every must be None for a model with layers of"):
        Plan.make(own, [tidal(select_layers=(3,), correct_every=8)])
    with pytest.raises(ValueError, match="layers must leave out a layer: the model itself"):
        Plan.make(own, [StreamingLLM(layers=(2,))])
    with pytest.raises(ValueError, match="leave one layer that selects and one that reuses"):
        Plan.make(shape(windows=(128,) * 6), [TidalDecode()])


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 1))), st.booleans())
def test_composition_gives_each_head_one_job(heads, razor_first):
    parts = [razor(heads=heads), tidal()]
    rows = Plan.make(shape(), parts if razor_first else parts[::-1]).rows
    for layer, row in enumerate(rows):
        for head, mode in enumerate(row):
            if layer < 2:
                assert mode == "dense"
            elif layer in (2, 4):
                assert mode == "select"
            else:
                assert mode == ("reuse" if (layer, head) in heads else "razor")


@pytest.mark.parametrize(
    ("policy", "windows", "error"),
    [
        (tidal(select_layers=(5,)), (), r"select_layers must leave a layer after .*, got \(5,\)"),
        (
            tidal(select_layers=(4, 5)),
            (),
            r"select_layers must leave a layer after .*, got \(4, 5\)",
        ),
        (StreamingLLM(), (8,) * 6, "layers must find one that may drop keys; .*, got None"),
        (razor(), (8,) * 6, r"dense_layers must leave a layer that may drop, got \(0, 1\)"),
    ],
)
def test_a_policy_that_could_do_nothing_is_refused(policy, windows, error):
    with pytest.raises(ValueError, match=error):
        Plan.make(shape(windows=windows), [policy])


def test_two_free_layers_are_one_that_selects_and_one_that_reuses():
    assert signs([TidalDecode()], shape(4)) == ["##", "##", "SS", "rr"]
    windows = (None, None, None, 8, None, 8, 8, 8, 8, 8)
    assert "rr" in signs([TidalDecode()], shape(10, windows))
