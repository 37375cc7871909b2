"""Laws of the zoo's models: blocks are causal, and a row's answer depends on that row alone."""

import copy

import pytest
import torch
from zoo_models import VOCAB, build, decoded, draw, forced, prompts

from adaptive.zoo import run


@pytest.fixture(scope="module", params=["block", "vanilla", "recursive"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def block():
    return build("block")


@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 64, 75])  # 75 tokens are more than 16 blocks
def test_generation_is_step_by_step_teacher_forcing(model, tokens):
    ids = draw(2, tokens, seed=tokens)
    new = torch.stack(model.generate(ids, 11))
    logits = forced(model, torch.cat([ids, new], 1), tokens)[:, tokens - 1 : -1]
    assert torch.equal(new, logits.argmax(-1))
    assert len(new.unique()) > 3  # not one token for ever, which anything would repeat
    steps = decoded(model, list(ids), new)
    torch.testing.assert_close(steps, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_token_changes_later_logits_and_no_earlier_ones(block, padding):
    """In its own block through the token decoder, in later ones through the block decoder."""
    ids = draw(1, 23)
    before = block(ids, padding=padding)
    for place in range(23):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % VOCAB
        changed = (block(other, padding=padding) != before).any(-1)[0]
        assert not changed[:place].any()
        assert changed[place:].all()


def test_tokens_of_earlier_blocks_are_seen_through_the_block_decoder_alone(block):
    """Without what it says, a block is told from its own tokens, wherever it stands."""
    silent = build("block")
    torch.nn.init.zeros_(silent.prefix.weight)
    ids = draw(1, 24)
    with torch.no_grad():
        logits = silent(ids)
        swapped = silent(ids.view(1, 6, 4).flip(1).reshape(1, 24))
    inside = [i for i in range(24) if i % 4 != 3]  # logits at a block's last token tell the next's
    found = swapped.view(6, 4, -1).flip(0).reshape(24, -1)
    torch.testing.assert_close(found[inside], logits[0, inside])
    with torch.no_grad():
        spoken = block(ids.view(1, 6, 4).flip(1).reshape(1, 24)).view(6, 4, -1).flip(0)
    assert (spoken.reshape(24, -1) - block(ids)[0])[inside].abs().max() > 0.1


@pytest.mark.parametrize("lengths", [[1, 4, 7, 18, 33], [5, 130, 66], [90, 90, 71]])
def test_a_padded_batch_is_its_rows_alone(model, lengths):
    rows = prompts(lengths)
    new = model.generate(rows, 10)
    logits = decoded(model, rows, torch.stack(new))
    for row, tokens, found in zip(rows, new, logits, strict=True):
        alone = model.generate([row], 10)[0]
        assert torch.equal(tokens, alone)
        expected = decoded(model, [row], alone[None])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_prompts_that_run_a_few_rows_at_a_time_are_the_same(model, monkeypatch):
    rows = prompts([90, 12, 71, 90, 66])
    expected = model.generate(rows, 5)
    monkeypatch.setattr(run, "PREFILL_POSITIONS", 200)
    found = model.generate(rows, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("vocab_size", [2048, 2050, 128])
def test_the_best_token_is_the_first_of_the_largest(vocab_size):
    scores = torch.randint(0, 40, (50, vocab_size), generator=torch.Generator().manual_seed(0))
    scores = scores.float()
    assert torch.equal(run.best(scores), scores.argmax(-1))
    assert torch.equal(run.best(-scores), (-scores).argmax(-1))


def test_rows_that_finish_leave_and_change_no_other(model):
    rows = prompts([3, 90, 8, 21, 40, 2])
    free = model.generate(rows, 24)
    counts = torch.stack(free).flatten().bincount(minlength=VOCAB)
    finished = set()
    for eos in counts.topk(4).indices.tolist():
        found = model.generate(rows, 24, eos_token_id=eos)
        for tokens, whole in zip(found, free, strict=True):
            hits = (whole == eos).nonzero()
            end = int(hits[0]) + 1 if len(hits) else 24
            finished.add(end)
            assert torch.equal(tokens, whole[:end])
    assert len(finished) > 3  # rows did finish at different times


def test_finished_rows_take_their_kv_along(model):
    rows = prompts([90, 90, 90, 90])
    free = torch.stack(model.generate(rows, 24))
    eos = int(free[0, 2])
    ended = sum(bool((row[:20] == eos).any()) for row in free)
    found = model.generate(rows, 24, eos_token_id=eos)
    report = model.report()
    assert ended >= 1
    assert report.rows == 4
    assert report.new_tokens == sum(len(row) for row in found) < 4 * 24


def test_draws_of_a_row_do_not_depend_on_who_finished(model):
    rows = prompts([3, 90, 8, 21])

    def sample(eos):
        generator = torch.Generator().manual_seed(5)
        options = {"do_sample": True, "temperature": 0.7, "generator": generator}
        return model.generate(rows, 20, eos_token_id=eos, **options)

    free = sample(None)
    assert not all(torch.equal(a, b) for a, b in zip(free, model.generate(rows, 20), strict=True))
    eos = int(free[1][3])
    for tokens, whole in zip(sample(eos), free, strict=True):
        assert torch.equal(tokens, whole[: len(tokens)])
    assert len(sample(eos)[1]) <= 4


def test_draws_follow_the_softmax(model):
    """A thousand rows of one prompt: frequencies are near the probabilities."""
    ids = draw(1, 6).expand(1000, -1)
    generator = torch.Generator().manual_seed(1)
    first = torch.cat(model.generate(ids, 1, do_sample=True, temperature=0.5, generator=generator))
    share = first.bincount(minlength=VOCAB) / 1000
    expected = (forced(model, ids[:1], 6)[0, -1] / 0.5).softmax(-1)
    assert (share - expected).abs().max() < 0.06
    assert (expected > 0.05).sum() > 1


@pytest.mark.parametrize(("tokens", "new"), [(1, 1), (8, 4), (9, 5), (31, 8)])
def test_one_kv_entry_per_block(block, tokens, new):
    block.generate(draw(3, tokens), new)
    report = block.report()
    entries = -(-tokens // 4) + -(-new // 4) - 1  # what nobody will read is not appended
    assert report.kv_entries == entries
    per_entry = 2 * 2 * 32 * 4 * 2  # keys and values, kv_heads, head_dim, bytes, layers
    assert report.kv_bytes == 3 * entries * per_entry
    assert report.kv_bytes_per_token == per_entry / 4
    assert block.kv_bytes_per_token == report.kv_bytes_per_token


def test_a_block_transformer_has_a_fraction_of_the_kv_of_a_vanilla_one(block):
    vanilla = build("vanilla", layers=4)
    assert vanilla.kv_bytes_per_token == 8 * block.kv_bytes_per_token


def test_gradients_reach_every_parameter(model):
    trained = copy.deepcopy(model).train()
    trained.loss(draw(2, 21)).backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any(), name


def test_loss_is_the_cross_entropy_of_labels(model):
    ids = draw(2, 9)
    labels = ids.clone()
    labels[:, :5] = -100
    logits = model(ids).log_softmax(-1)
    expected = -logits[:, :-1].gather(2, ids[:, 1:, None])[:, 4:].mean()
    torch.testing.assert_close(model.loss(ids, labels), expected)
    with pytest.raises(ValueError, match="labels must have the shape of ids"):
        model.loss(ids, labels[:, :-1])


@pytest.mark.parametrize("block_length", [1, 2, 8])
def test_other_block_lengths(block_length):
    model = build("block", block_length=block_length, prefix_length=3)
    ids = draw(2, 13)
    new = torch.stack(model.generate(ids, 9))
    logits = forced(model, torch.cat([ids, new], 1), 13)[:, 12:-1]
    assert torch.equal(new, logits.argmax(-1))
