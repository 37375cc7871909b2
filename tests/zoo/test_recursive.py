"""Laws of recursive transformers: gathering gives what masking gives, and decoding the same."""

import copy
import itertools

import pytest
import torch
from recursive_reference import reference
from zoo_models import SIZES, VOCAB, build, decoded, draw, prompts

from adaptive.zoo import RecursiveTransformer, RecursiveTransformerConfig, recursive

FORMS = [
    {"router": router, "kv": kv, "weighted": weighted}
    for router, kv, weighted in itertools.product(
        ("expert", "token", None), ("recursion", "shared"), (True, False)
    )
    if weighted or (router is not None and kv == "shared")
]
# A first recursion that is chosen for, too; one that all tokens of the one before go on to
FORMS += [
    {"router": "expert", "kv": kv, "capacities": shares}
    for kv in ("recursion", "shared")
    for shares in ((0.7, 0.5, 0.2), (1.0, 1.0, 0.4))
]
TOKENS = 33


def name(form):
    return "-".join(str(value) for value in form.values())


@pytest.fixture(scope="module", params=FORMS, ids=name)
def model(request):
    return build("recursive", **request.param)


def double(model):
    """The same numbers in float64, for the reference."""
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("select", ["capacity", "threshold"])
def test_gathered_tokens_give_what_masking_gives(model, select):
    ids = draw(3, TOKENS, seed=5)
    expected, depths, aux, z = reference(double(model), ids, select)
    assert torch.equal(model.depths(ids, select=select), depths)
    found = model(ids, select=select)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    losses = model.losses(ids, select=select)
    torch.testing.assert_close(losses["aux"].double(), aux.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["z"].double(), z.double(), rtol=1e-4, atol=1e-5)
    if model.config.router is not None:
        assert len(depths.unique()) > 1  # tokens do differ
    if model.config.router == "expert" and select == "capacity":
        for turn, share in enumerate(model.config.capacities):
            room = TOKENS if share == 1 else max(1, int(share * TOKENS))
            previous = (depths >= turn).sum(1)
            assert ((depths > turn).sum(1) == previous.clamp(max=room)).all()


def test_gradients_are_those_of_masking(model):
    ids = draw(2, 17, seed=6)
    exact = double(model)
    logits, _, aux, z = reference(exact, ids, "capacity")
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    total = expected + 0.01 * aux + 0.001 * z
    total.backward()
    trained = copy.deepcopy(model).train()
    loss = trained.loss(ids)
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=0)
    loss.backward()
    wanted = dict(exact.named_parameters())
    for key, parameter in trained.named_parameters():
        assert parameter.grad is not None, key
        scale = float(wanted[key].grad.abs().max())
        torch.testing.assert_close(
            parameter.grad.double(), wanted[key].grad, rtol=1e-3, atol=1e-4 * scale + 1e-9
        )


@pytest.mark.parametrize("lengths", [[3, 40, 1, 18]])
def test_decoding_is_teacher_forcing_and_a_row_depends_on_itself_alone(model, lengths):
    rows = prompts(lengths)
    new = model.generate(rows, 9)
    steps = decoded(model, rows, torch.stack(new))
    for row, tokens, found in zip(rows, new, steps, strict=True):
        assert torch.equal(tokens, model.generate([row], 9)[0])
        with torch.no_grad():
            logits = model(torch.cat([row, tokens])[None])[0, len(row) - 1 : -1]
        assert torch.equal(tokens, logits.argmax(-1))
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_keys_and_values_are_of_the_tokens_that_ran_a_recursion(model):
    rows = prompts([30, 7, 19])
    new = model.generate(rows, 12)
    report = model.report()
    config = model.config
    held = entries = 0
    depths = [0] * (config.recursions + 1)
    for row, tokens in zip(rows, new, strict=True):
        found = model.depths(torch.cat([row, tokens])[None, :-1])[0]
        held += 2 * len(found)
        turns = found if config.kv == "recursion" else (found > 0).long()
        entries += int(turns.sum())
        for depth in found[len(row) :].tolist():
            depths[depth] += 1
    per_layer = 2 * 2 * 32 * 4  # keys and values, kv_heads, head_dim, bytes
    assert report.kv_bytes == per_layer * (held + 2 * entries)
    assert report.kv_bytes <= model.kv_bytes_per_token * held / 2
    assert report.depths == tuple(depths)
    assert report.kv_entries == 41


def test_a_later_token_changes_nothing_before_it_where_a_threshold_decides(model):
    ids = draw(1, 12)
    before = model(ids)
    for place in (0, 5, 11):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % VOCAB
        found = (model(other) - before).abs().amax(-1)[0]
        assert (found[:place] <= 1e-4).all()
        assert (found[place:] > 1e-4).all()


def test_with_room_for_all_the_model_is_a_plain_loop():
    plain = build("recursive", router=None, kv="recursion")
    full = {"router": "expert", "capacities": (1.0, 1.0, 1.0), "weighted": False}
    routed = build("recursive", **full)
    routed.load_state_dict(plain.state_dict(), strict=False)
    ids = draw(2, 21)
    for select in ("capacity", "threshold"):
        assert torch.equal(routed(ids, select=select), plain(ids))
    x = plain.embedding(ids)
    for layer in [*plain.first_layers, *list(plain.block_layers) * 3, *plain.last_layers]:
        x = layer(x, plain._rotation(torch.arange(21), x.dtype))
    assert torch.equal(plain._told(x), plain(ids))
    for one, other in zip(routed.generate(ids, 8), plain.generate(ids, 8), strict=True):
        assert torch.equal(one, other)


def test_a_router_that_always_says_once_makes_it_a_plain_stack():
    model = build("recursive", router="token", weighted=False)
    torch.nn.init.zeros_(model.router.weight)  # of equal scores the first
    once = build("recursive", router=None, recursions=1)
    once.load_state_dict({k: v for k, v in model.state_dict().items() if k != "router.weight"})
    ids = draw(2, 21)
    assert torch.equal(model(ids), once(ids))
    assert model.depths(ids).unique().tolist() == [1]


def test_the_auxiliary_loss_teaches_the_threshold_what_the_capacity_takes():
    model = build("recursive", capacities=(1.0, 0.2, 0.1))
    ids = draw(4, 30)

    def agreement():
        by_capacity = model.depths(ids, select="capacity")
        return float((model.depths(ids, select="threshold") == by_capacity).float().mean())

    before = agreement()
    optimizer = torch.optim.Adam(model.router.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model.losses(ids, select="capacity")["aux"].backward()
        optimizer.step()
    assert agreement() > before + 0.15


@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_of_weights_and_of_kv(dtype, kv_dtype):
    model = build("recursive").to(dtype)
    rows = prompts([40, 3])
    new = model.generate(rows, 6, kv_dtype=kv_dtype)
    assert [len(row) for row in new] == [6, 6]
    itemsize = (kv_dtype or dtype).itemsize
    assert model.report().kv_bytes % (2 * 2 * 32 * itemsize) == 0
    assert model.report().kv_bytes <= model.kv_bytes_per_token / dtype.itemsize * itemsize * 53


def test_files_bring_back_the_same_model(tmp_path):
    for router in ("expert", "token", None):
        model = build("recursive", router=router, first_layers=0)
        model.save_pretrained(tmp_path)
        again = RecursiveTransformer.from_pretrained(tmp_path)
        assert again.config == model.config
        ids = draw(2, 9)
        assert torch.equal(again(ids), model(ids))
    routed = build("recursive", router="token", first_layers=0)
    routed.config.save(tmp_path / "config.json")  # beside the weights of a model without a router
    with pytest.raises(ValueError, match=r"router.weight of .* shape \[3, 128\], got none"):
        RecursiveTransformer.from_pretrained(tmp_path)


def test_scores_that_are_no_numbers_are_named():
    for router in ("expert", "token"):
        model = build("recursive", router=router)
        with torch.no_grad():
            model.router.weight[1, 3] = float("nan")
        for call in (lambda m=model: m(draw(1, 9)), lambda m=model: m.generate(draw(1, 3), 9)):
            with pytest.raises(ValueError, match="adaptive::zoo: the router's scores must be num"):
                call()


def test_a_selection_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=f"select must be one of .*{recursive.SELECT[0]}"):
        build("recursive")(draw(1, 5), select="best")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_layers": 0}, "block_layers must be a whole number from 1 on, got 0"),
        ({"recursions": 2.0}, "recursions must be a whole number from 1 on"),
        ({"first_layers": -1}, "first_layers must be a whole number from 0 on, got -1"),
        ({"router": "both"}, "router must be one of .*, got 'both'"),
        ({"kv": None}, "kv must be one of .*, got None"),
        ({"weighted": 1}, "weighted must be one of .*, got 1"),
        ({"capacities": (1.0, 0.5)}, "capacities must be 3 numbers above 0 and at most 1"),
        ({"capacities": (1.0, 0.5, 0.0)}, "capacities must be 3 numbers above 0"),
        ({"capacities": (1.0, 0.5, 1.5)}, "capacities must be 3 numbers above 0 and at most 1"),
        ({"capacities": (1.0, 0.3, 0.5)}, "capacities must not grow"),
        ({"capacities": (1.0,) * 3, "router": "token"}, "capacities must be None for router='tok"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
        ({"threshold": float("nan")}, "threshold must be in"),
        ({"alpha": float("inf")}, "alpha must be finite, from 0 on, got inf"),
        ({"aux_loss": -1}, "aux_loss must be finite, from 0 on, got -1"),
        ({"width": 132, "head_dim": 32}, "width must be a multiple of 8 for a router, got 132"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match="adaptive::zoo: " + message):
        RecursiveTransformerConfig(**{**SIZES, "block_layers": 1, "recursions": 3, **changes})
