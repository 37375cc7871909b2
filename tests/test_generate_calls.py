"""A `generate` that a policy answers: what stands in a configuration, and other threads."""

import copy
import pickle
import threading

import pytest
import torch
from models import greedy, make, token_ids
from speculation_cases import LAB, TOKENS, model_of, plain
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria

import adaptive

POLICIES = [
    adaptive.SelfSpeculative(exit_layer=2, draft=4),
    adaptive.SelfSpeculative(skip=((2,), (1, 3)), draft=4),
    adaptive.EarlyExit(layers=(2,), threshold=1.1),
]


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[2]], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("way", ["position", "name", "model"])
def test_stop_strings_are_heeded_wherever_they_stand(policy, way):
    tokenizer = AutoTokenizer.from_pretrained(LAB)
    model = AutoModelForCausalLM.from_pretrained(LAB).eval()
    ids = tokenizer("def first(items):\n    return items[0]\n\ndef ", return_tensors="pt").input_ids
    want = plain(model, ids, 40, stop_strings=["\n"], tokenizer=tokenizer)
    assert want.shape[1] < ids.shape[1] + 40
    fields = {"max_new_tokens": 40, "pad_token_id": 0, "do_sample": False}
    config = GenerationConfig(**fields, stop_strings=["\n"])
    args, given = (), {}
    if way == "position":
        args = (config,)
    elif way == "name":
        given = {"generation_config": config}
    else:
        model.generation_config.stop_strings, given = ["\n"], fields
    with adaptive.patch(model, policy):
        assert torch.equal(model.generate(ids, *args, tokenizer=tokenizer, **given), want)
        with pytest.raises(ValueError, match="tokenizer"):  # as without a policy
            model.generate(ids, *args, **given)
        free = {**given, "tokenizer": tokenizer, "stop_strings": ["never to be seen"]}
        assert model.generate(ids, *args, **free).shape[1] == ids.shape[1] + 40
    assert config.stop_strings == ["\n"]


class Meanwhile(StoppingCriteria):
    """Stops nothing; has something done after some tokens."""

    def __init__(self, do, tokens=3):
        self.do = do
        self.left = tokens

    def __call__(self, input_ids, scores, **_):
        self.left -= 1
        if self.left == 0:
            self.do()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def in_a_thread(run):
    """What it returns or raises in another thread."""
    found = []

    def caught():
        try:
            found.append(run())
        except RuntimeError as error:
            found.append(error)

    other = threading.Thread(target=caught)
    other.start()
    other.join(60)
    return found[0]


@pytest.mark.parametrize("policy", POLICIES, ids=["exit", "skip", "early"])
def test_another_thread_cannot_generate_meanwhile(policy):
    model, found = model_of("llama"), []
    with adaptive.patch(model, policy):
        want = greedy(model, token_ids(1), TOKENS)
        meanwhile = Meanwhile(
            lambda: found.append(in_a_thread(lambda: greedy(model, token_ids(1))))
        )
        made = greedy(model, token_ids(1), TOKENS, stopping_criteria=[meanwhile])
        name = type(policy).__name__
        assert isinstance(found[0], RuntimeError)
        assert f"adaptive: {name}: another thread is generating" in str(found[0])
        assert torch.equal(made, want)
        assert torch.equal(in_a_thread(lambda: greedy(model, token_ids(1), TOKENS)), want)


@pytest.mark.parametrize("policy", POLICIES, ids=["exit", "skip", "early"])
def test_a_pass_of_another_thread_runs_all_layers(policy):
    """Also while a pass of the thread that generates leaves some out."""
    model, found = model_of("llama"), []
    with adaptive.patch(model, policy):
        want = model(token_ids(1)).logits
        layer, busy = model.model.layers[0], []

        def look(*_):
            depth = model.model.layers[0].__dict__["forward"].depth
            partial = depth.active or any(depth.skips)
            if partial and not busy:
                busy.append(True)
                found.append(in_a_thread(lambda: model(token_ids(1)).logits))

        hook = layer.register_forward_pre_hook(look)
        with torch.no_grad():
            greedy(model, token_ids(1), 8)
        hook.remove()
    assert torch.equal(found[0], want)


def test_generating_within_generating_is_for_the_same_thread():
    model, found = model_of("llama"), []
    with adaptive.patch(model, POLICIES[0]):
        want = greedy(model, token_ids(1), TOKENS)
        inner = Meanwhile(lambda: found.append(greedy(model, token_ids(1), TOKENS)))
        made = greedy(model, token_ids(1), TOKENS, stopping_criteria=[inner])
    assert torch.equal(made, want)
    assert torch.equal(found[0], want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_meanwhile_is_free(copied):
    model, found = model_of("llama"), []
    with adaptive.patch(model, POLICIES[0]):
        want = greedy(model, token_ids(1), TOKENS)
        make = Meanwhile(lambda: found.append(copied(model)))
        greedy(model, token_ids(1), TOKENS, stopping_criteria=[make])
        assert torch.equal(in_a_thread(lambda: greedy(found[0], token_ids(1), TOKENS)), want)


def test_an_exception_frees_the_model():
    model = model_of("llama")

    def stop():
        raise KeyboardInterrupt

    with adaptive.patch(model, POLICIES[0]):
        with pytest.raises(KeyboardInterrupt):
            greedy(model, token_ids(1), TOKENS, stopping_criteria=[Meanwhile(stop)])
        made = in_a_thread(lambda: greedy(model, token_ids(1), TOKENS))
    assert torch.equal(made, plain(model, token_ids(1)))


def test_a_margin_needs_two_tokens():
    policy = adaptive.EarlyExit(layers=(1,), criterion="margin", threshold=0.5)
    with pytest.raises(
        adaptive.UnsupportedModel, match=r"EarlyExit.criterion='margin' needs a vocabulary of two"
    ):
        adaptive.patch(make("llama", vocab_size=1, pad_token_id=0), policy)
    with adaptive.patch(make("llama", vocab_size=2, pad_token_id=0), policy):
        pass


LEAVING = adaptive.EarlyExit(layers=(1, 2, 3), criterion="agreement", rows="alone", audit=None)


@pytest.mark.parametrize("policies", [(), (POLICIES[2],)], ids=["exact", "early"])
@pytest.mark.parametrize("way", ["argument", "configuration", "model"])
def test_stop_strings_end_a_prompt_of_many(policies, way):
    tokenizer = AutoTokenizer.from_pretrained(LAB)
    model = AutoModelForCausalLM.from_pretrained(LAB).eval()
    texts = ("def first(items):\n    return items[0]\n\ndef ", "import os", "class Reader:")
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    fields = {"max_new_tokens": 20, "pad_token_id": 1, "do_sample": False}
    stops = {"stop_strings": ["\n"], "tokenizer": tokenizer}
    want = [
        model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **fields, **stops)[0]
        for ids in prompts
    ]
    assert any(len(made) < len(ids) + 20 for made, ids in zip(want, prompts, strict=True))
    given = {**fields, **stops}
    if way == "configuration":
        config = GenerationConfig(**fields, stop_strings=["\n"])
        given = {"generation_config": config, "tokenizer": tokenizer}
    elif way == "model":
        model.generation_config.stop_strings = given.pop("stop_strings")
    with adaptive.patch(model, *policies) as patched:
        made = patched.generate_many(prompts, batch_size=2, **given)
        assert all(torch.equal(*each) for each in zip(made, want, strict=True))
        del given["tokenizer"]
        with pytest.raises(ValueError, match="tokenizer"):  # as generate
            patched.generate_many(prompts, **given)
    assert model.generation_config.stop_strings == (["\n"] if way == "model" else None)


def test_many_prompts_are_one_threads_alone_where_layers_are_left_out():
    model, found = model_of("llama"), []
    prompts = [token_ids(1)[0], token_ids(1)[0, :5]]

    def other():
        found.append(in_a_thread(lambda: greedy(model, token_ids(1))))
        found.append(in_a_thread(lambda: patched.generate_many(prompts, max_new_tokens=2)))
        exits.append(patched.report().exits.row_exits)

    exits = []
    with adaptive.patch(model, LEAVING) as patched:
        want = patched.generate_many(prompts, max_new_tokens=8)
        given = {"max_new_tokens": 8, "stopping_criteria": [Meanwhile(other, tokens=5)]}
        made = patched.generate_many(prompts, **given)
        assert all(torch.equal(*each) for each in zip(made, want, strict=True))
        assert any(exits[0])  # those of the call that goes on
        for error, name in zip(found, ("EarlyExit", "generate_many"), strict=True):
            assert isinstance(error, RuntimeError)
            assert f"adaptive: {name}: another thread is generating" in str(error)
        free = in_a_thread(lambda: patched.generate_many(prompts, max_new_tokens=8))
        assert all(torch.equal(*each) for each in zip(free, want, strict=True))
