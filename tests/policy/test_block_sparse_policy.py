"""BlockSparsePrefill: what is refused, by name; what plans it makes; the round trip."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaptive
from adaptive.policy import (
    BlockSparsePrefill,
    Exact,
    LocalAttention,
    ModelShape,
    Plan,
    Policy,
    Quest,
    RazorAttention,
    StreamingLLM,
    TidalDecode,
)

SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)
FIELDS = st.fixed_dictionaries(
    {
        "block": st.sampled_from([16, 32, 64, 128]),
        "per_head": st.booleans(),
        "sinks": st.integers(0, 99),
        "recent": st.integers(0, 99),
        "dense_tail": st.integers(0, 999),
        "min_context": st.integers(1, 10**6),
        "layers": st.none() | st.sets(st.integers(0, 90), min_size=1).map(sorted),
        "audit": st.none() | st.integers(1, 999),
    }
)
CHOICES = (
    st.fixed_dictionaries(
        {"pattern": st.sampled_from(["selected", "vertical_slash"]), "mass": SHARES}
    )
    | st.fixed_dictionaries(
        {
            "pattern": st.sampled_from(["selected", "vertical_slash", "a_shape"]),
            "budget": SHARES | st.just(1.0) | st.integers(15, 10**6),
        }
    )
    | st.fixed_dictionaries({"pattern": st.sampled_from(["selected", "a_shape"])})
)


def shape(layers=6, windows=()):
    return ModelShape(
        model_type="llama",
        heads=(4,) * layers,
        kv_heads=(2,) * layers,
        head_dim=(64,) * layers,
        windows=windows,
    )


@given(FIELDS, CHOICES)
def test_round_trip(fields, choice):
    policy = BlockSparsePrefill(**fields, **choice)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert eval(str(policy)) == policy
    assert hash(policy) == hash(BlockSparsePrefill(**fields, **choice))


def test_without_mass_or_budget_there_is_a_default():
    assert BlockSparsePrefill().mass == 0.95
    assert BlockSparsePrefill(budget=0.2).mass is None
    assert BlockSparsePrefill(pattern="a_shape").budget == 0.25


BAD = {
    "no mass": ({"mass": 0}, "mass must be above 0 and below 1, or None, got 0"),
    "all mass": ({"mass": 1.0}, "mass must be above 0 and below 1, or None, got 1.0"),
    "mass of NaN": ({"mass": math.nan}, "mass must be above 0 and below 1, or None, got nan"),
    "negative mass": ({"mass": -0.5}, "mass must be above 0 and below 1, or None, got -0.5"),
    "mass as text": ({"mass": "0.9"}, "mass must be above 0 and below 1, or None, got '0.9'"),
    "both": ({"mass": 0.9, "budget": 9}, "mass must be None beside a budget, got 0.9"),
    "mass of a window": (
        {"mass": 0.9, "pattern": "a_shape"},
        "mass must be None for a_shape, which estimates nothing, got 0.9",
    ),
    "no budget": ({"budget": 0}, "budget must be a whole number of blocks from 3 on .*got 0"),
    "a negative budget": ({"budget": -3}, "budget must be .*got -3"),
    "a negative share": ({"budget": -0.1}, "budget must be .* a share above 0 .*got -0.1"),
    "more than all": ({"budget": 1.5}, "budget must be .* at most 1.0, got 1.5"),
    "budget of NaN": ({"budget": math.nan}, "budget must be .*got nan"),
    "a budget that is true": ({"budget": True}, "budget must be .*got True"),
    "sinks fill the budget": (
        {"budget": 3, "sinks": 65},
        r"budget must be a whole number of blocks from 4 on \(sinks, recent .*got 3",
    ),
    "a block of 48": ({"block": 48}, "block must be 16, 32, 64 or 128, got 48"),
    "a block of text": ({"block": "64"}, "block must be 16, 32, 64 or 128, got '64'"),
    "an unknown pattern": (
        {"pattern": "diagonal"},
        "pattern must be one of selected, a_shape, vertical_slash, got 'diagonal'",
    ),
    "negative sinks": ({"sinks": -1}, "sinks must be a whole number from 0 on, got -1"),
    "negative recent": ({"recent": -1}, "recent must be a whole number from 0 on, got -1"),
    "a negative tail": ({"dense_tail": -1}, "dense_tail must be a whole number from 0 on, got -1"),
    "half a context": ({"min_context": 0.5}, "min_context must be a whole number from 1 on"),
    "no layer": ({"layers": ()}, r"layers must name a layer, or be None, got \(\)"),
    "layers twice": ({"layers": (1, 1)}, "layers must be ascending layer numbers from 0, or None"),
    "no audit": ({"audit": 0}, "audit must be a whole number from 1 on, or None, got 0"),
    "per_head of None": ({"per_head": None}, "per_head must be True or False, got None"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_named(name):
    fields, message = BAD[name]
    with pytest.raises(ValueError, match=f"adaptive: BlockSparsePrefill.{message}"):
        BlockSparsePrefill(**fields)


def test_the_map_shows_prompts_beside_heads():
    tidal = TidalDecode(select_layers=(2, 4))
    policies = [Exact(stock_layers=(1,)), tidal, BlockSparsePrefill(layers=(0, 2, 3))]
    plan = Plan.make(shape(), policies)
    assert str(plan).splitlines() == [
        "plan for llama: 6 layers x KV heads",
        "        0  ##  b",
        "        1  ..",
        "        2  SS  b",
        "        3  rr  b",
        "        4  SS",
        "        5  rr",
        "        #  dense: reads every key, native kernel",
        "        .  stock: the model's own attention",
        "        S  select: reads every key, and chooses some for the layers below it",
        "        r  reuse: reads the keys that the last select layer chose",
        "        b  blocks: prompts read chosen blocks of keys",
    ]
    assert [plan.prefill(layer) is policies[2] for layer in range(6)] == [
        *(True, False, True, True, False, False)
    ]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


OTHERS = {
    "tidal": TidalDecode(),
    "quest": Quest(),
    "streaming": StreamingLLM(),
    "razor": RazorAttention(heads=((2, 0),)),
    "exact": Exact(),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_decoding_is_left_to_the_other_policies(other):
    alone = Plan.make(shape(), [other])
    for order in ([other, BlockSparsePrefill()], [BlockSparsePrefill(), other]):
        if order[1] == Exact():
            with pytest.raises(ValueError, match="Exact must come before BlockSparsePrefill"):
                Plan.make(shape(), order)
            continue
        both = Plan.make(shape(), order)
        assert both.rows == alone.rows
        assert all(both.prefill(layer) == BlockSparsePrefill() for layer in range(6))


def test_layers_with_a_window_are_left_alone():
    plan = Plan.make(shape(4, (None, 512, None, 512)), [BlockSparsePrefill()])
    assert [plan.prefill(layer) is not None for layer in range(4)] == [True, False, True, False]


def test_layers_with_local_heads_are_left_to_those():
    local = LocalAttention(window=9, heads=((1, 0), (3, 1)))
    for order in ([local, BlockSparsePrefill()], [BlockSparsePrefill(), local]):
        plan = Plan.make(shape(), order)
        chosen = [plan.prefill(layer) is not None for layer in range(6)]
        assert chosen == [True, False, True, False, True, True]
    with pytest.raises(ValueError, match="leave out a layer: some of its heads are local"):
        Plan.make(shape(), [local, BlockSparsePrefill(layers=(3,))])


@pytest.mark.parametrize(
    ("policies", "windows", "message"),
    [
        ([BlockSparsePrefill(layers=(6,))], (), "layers must be below the model's 6 layers, got 6"),
        (
            [BlockSparsePrefill(layers=(1,))],
            (None, 9, *[None] * 4),
            "layers must leave out a layer: the model itself gives that layer a window of 9",
        ),
        (
            [Exact(stock_layers=(3,)), BlockSparsePrefill(layers=(3,))],
            (),
            "layers must leave out a layer: Exact leaves that layer",
        ),
        ([BlockSparsePrefill()], (9,) * 6, "layers must find one that may skip keys"),
        (
            [BlockSparsePrefill(), BlockSparsePrefill(budget=0.5)],
            (),
            "a second BlockSparsePrefill cannot be combined",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(policies, windows, message):
    with pytest.raises(ValueError, match=f"adaptive: .*{message}"):
        Plan.make(shape(6, windows), policies)


def test_it_is_public():
    assert adaptive.BlockSparsePrefill is BlockSparsePrefill
