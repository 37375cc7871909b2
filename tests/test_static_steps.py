"""A static step asks the host nothing and moves nothing: what a CUDA graph of it needs."""

from contextlib import contextmanager

import pytest
import torch
from models import greedy, make, padded, token_ids
from speculation_cases import drafting, fields, model_of, plain
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import adaptive
from adaptive.layers import hf_static, static_steps
from adaptive.layers.cuda_graph import WARM_UPS, Captured, Ending, LateEnding
from adaptive.layers.hf_static_step import StaticStep
from adaptive.layers.static_rows import StaticRows
from adaptive.layers.static_steps import StaticSteps, capacity_for, weights_of
from adaptive.ops import verify_draft

STATIC = {"exit_layer": 2, "draft": 4, "static": True}


class Cuda:
    """Stands in for torch.cuda: a graph that runs the step when it is replayed, and a log."""

    def __init__(self, step=None):
        self.step, self.log = step, []

    def __getattr__(self, name):
        if name == "current_stream":
            return lambda: self
        if name in ("Stream", "Event", "CUDAGraph"):
            return lambda: self
        return lambda *_, **__: self.log.append(name)

    @contextmanager
    def stream(self, _):
        self.log.append("side")
        yield

    @contextmanager
    def graph(self, _, stream, capture_error_mode):
        self.log.append("capture")
        yield

    def replay(self):
        self.log.append("replay")
        self.step()


def loaded(model, drafts=3, batch=2, **options):
    """A step that has read a prompt of a patched model."""
    step = StaticStep(model, batch, 256, 2, drafts, 2)
    for name, value in options.items():
        setattr(step, name, value)
    ids = token_ids(batch)
    with torch.no_grad():
        read = model(ids, use_cache=True)
        first = read.logits[:, -1:].argmax(-1)
        step.begin(read.past_key_values, None, first, 40, [], 0)
    return step


@torch.no_grad()
def run(step, steps=1):
    for _ in range(steps):
        step.step()


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("case", ["llama", "gpt2", "granite", "phi3"])
def test_a_step_never_asks_for_the_value_of_a_tensor(case, drafts):
    """Fake tensors have none: whoever asks, for a number, a flag or a size, gets an error."""
    with FakeTensorMode():
        model = make(case, **fields(case))
        with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
            run(StaticStep(model, 2, 256, 2, 0, 2))
            step = StaticStep(model, 2, 256, 2, drafts, 2)
            run(step, 2)
        assert all(isinstance(tensor, FakeTensor) for tensor in step.state().values())


def test_a_step_that_asked_would_be_seen():
    def asks(drafted, choices):
        assert int(drafted[0, 0]) >= 0
        return verify_draft(drafted, choices)

    with FakeTensorMode():
        model = make("llama", **fields("llama"))
        with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
            step = StaticStep(model, 2, 256, 2, 3, 2)
            run(step)
            step.verify = asks
            with pytest.raises(Exception, match="_local_scalar_dense"):
                run(step)


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_memory_of_a_step_stays_where_it_is(drafts):
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        step = loaded(model, drafts)
        before = {name: t.data_ptr() for name, t in step.state().items()}
        content = {name: t.clone() for name, t in step.state().items()}
        run(step, 2)
        assert {name: t.data_ptr() for name, t in step.state().items()} == before
    changed = {name for name, t in step.state().items() if not torch.equal(t, content[name])}
    assert changed >= {"rows.lengths", "rows.last", "rows.made", "rows.tokens", "rows.counts"}
    assert {f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(4)} <= changed


def test_without_drafts_a_step_is_plain_decoding():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        step = loaded(model, drafts=0)
        run(step, 11)
    assert torch.equal(step.rows.tokens[:, :12], plain(model, token_ids(2), 12)[:, 20:])


def test_steps_after_the_end_change_nothing_that_matters():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        step = loaded(model)
        run(step)
        step.rows.alive[0] = False
        before = {name: t.clone() for name, t in step.rows.state().items()}
        lengths = before["lengths"].tolist()
        kept = [layer.keys[0, :, : lengths[0]].clone() for layer in step.cache.layers]
        run(step, 3)
        rows = step.rows
        made, counted = rows.made.clone(), rows.counts.clone()
        rows.alive[1] = False
        run(step)
    for name in ("lengths", "made", "last", "tokens"):
        assert torch.equal(getattr(rows, name)[0], before[name][0])
    assert (made - before["made"])[1] >= 3  # the other row went on
    for layer, keys in zip(step.cache.layers, kept, strict=True):
        assert torch.equal(layer.keys[0, :, : lengths[0]], keys)
    assert torch.equal(rows.made, made)
    assert torch.equal(rows.counts, counted)
    assert not rows.going


def test_rows_end_at_a_token_at_their_limit_and_not_before():
    rows = StaticRows(3, 16, 2, torch.device("cpu"))
    rows.begin(torch.tensor([4, 5, 6]), torch.tensor([[1], [1], [9]]), 5, [9], 0)
    assert rows.alive.tolist() == [True, True, False]
    rows.keep(torch.tensor([[2, 9, 3], [2, 2, 9], [7, 7, 7]]), torch.tensor([2, 1, 2]))
    assert rows.tokens[:, :4].tolist() == [[1, 2, 9, 0], [1, 2, 2, 0], [9, 0, 0, 0]]
    assert rows.alive.tolist() == [False, True, False]
    assert rows.lengths.tolist() == [4 + 2, 5 + 2, 6]
    rows.keep(torch.tensor([[8, 8, 8]] * 3), torch.tensor([2, 2, 2]))
    assert rows.tokens[:, :6].tolist() == [
        [1, 2, 9, 0, 0, 0],
        [1, 2, 2, 8, 8, 0],
        [9, 0, 0, 0, 0, 0],
    ]
    assert rows.counts.tolist() == [2, 3, 5]
    assert not rows.going


@pytest.mark.parametrize("stop", [False, True])
def test_generate_replays_what_was_captured_and_sees_the_end_one_step_late(monkeypatch, stop):
    """On a device without one: the same wrapper, around a graph that runs the step."""
    made, endings = [], []

    def capture(step):
        made.append(Cuda(step))
        return Captured(step, made[-1])

    def ending():
        endings.append(LateEnding(Cuda(), pinned=False))
        return endings[-1]

    monkeypatch.setitem(static_steps.CAPTURE, "cpu", capture)
    monkeypatch.setattr(hf_static, "Ending", ending)
    model, inputs = model_of("llama"), padded(batch=2)
    free = plain(model, inputs)[:, 20:]
    options = {"eos_token_id": [int(free[0, 3]), int(free[1, 3])]} if stop else {}
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)) as patched:
        ours = [greedy(model, inputs, 20, **options) for _ in range(2)]
        checks = patched.report().speculation.steps
    assert all(torch.equal(each, plain(model, inputs, 20, **options)) for each in ours)
    (cuda,) = made  # one capture for both calls
    setup = ["wait_stream", "side", "wait_stream", "capture"]
    assert cuda.log == setup + ["replay"] * (checks + 2)  # a step in vain in each call
    assert len(endings) == 2


def test_the_end_is_known_at_once_or_one_step_late():
    flags = [torch.tensor([value]) for value in (True, True, False, False)]
    for ending, want in (
        (Ending(), [False, False, True, True]),
        (LateEnding(Cuda(), pinned=False), [False, False, False, True]),
    ):
        found = []
        for flag in flags:
            ending.note(flag)
            found.append(ending.over())
        assert found == want


def test_a_capture_is_made_after_warm_ups_on_a_stream_of_its_own():
    cuda, ran = Cuda(), []
    captured = Captured(lambda: ran.append(list(cuda.log)), cuda)
    assert [log[-1] for log in ran] == ["side"] * WARM_UPS + ["capture"]
    cuda.step = lambda: None
    captured()
    assert cuda.log[-1] == "replay"


def test_a_graph_is_of_the_weights_and_modules_that_it_was_captured_with():
    model = drafting("llama")
    was = weights_of(model)
    assert weights_of(model) == was
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight.mul_(2)  # the graph reads it where it is
        assert weights_of(model) == was
        mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.clone())
    assert weights_of(model) != was
    was = weights_of(model)
    hook = mlp.register_forward_hook(lambda *_: None)
    assert weights_of(model) != was
    hook.remove()
    assert weights_of(model) == was
    mlp.up_proj.base_layer = torch.nn.Linear(1, 1)  # as adapters do
    assert weights_of(model) != weights_of(model)


def test_few_steps_are_kept_and_only_for_what_they_are_made_for(monkeypatch):
    captured = []
    monkeypatch.setitem(
        static_steps.CAPTURE, "cpu", lambda step: captured.append(step) or (lambda: step())
    )
    model = drafting("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        steps = model.__dict__["generate"]._steps
        for batch, want in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
            greedy(model, token_ids(batch))
            assert len(captured) == want
            assert len(steps._held) <= static_steps.MOST
        with torch.no_grad():
            weight = model.model.layers[3].mlp.up_proj.weight
            model.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(weight * 3)
        made = greedy(model, token_ids(2))
        assert len(captured) == 5
    assert torch.equal(made, plain(model, token_ids(2), 8))


def test_a_step_serves_shorter_calls_but_not_far_shorter_ones():
    assert [capacity_for(n) for n in (1, 256, 257)] == [256, 256, 512]

    class Step:
        capacity, held_bytes, step = 4096, 7, None

    steps = StaticSteps()
    steps.add(static_steps.Held(Step(), "key", None))
    assert steps.find("key", 4097) is steps.find("key", 1000) is steps.find("other", 4096) is None
    assert steps.find("key", 2000).step.capacity == 4096
    assert steps.held_bytes == 7
