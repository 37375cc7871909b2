"""The op mechanism: which way a call takes, what it costs, what it refuses."""

import ctypes
import statistics
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive import _native
from adaptive.ops import OPS, decode_attention

SIZES = {"batch": 1, "heads": 4, "kv_heads": 2, "capacity": 70, "head_dim": 64}


def inputs(**changes):
    return decode_attention.make_inputs(**{**SIZES, **changes}, dtype=torch.float32, device="cpu")


def test_ops_are_listed_by_name():
    assert OPS["decode_attention"] is decode_attention
    assert repr(decode_attention) == "adaptive.ops.decode_attention"
    assert "Flash-Decoding" in decode_attention.__doc__


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend):
    def step(query, key, value):
        out, lse = decode_attention(query, key, value, causal=False)
        return out * 2, lse

    query, key, value, *_ = inputs()
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        before = _native.calls().get("decode_attention:cpu", 0)
        out, lse = compiled(query, key, value)
        assert _native.calls()["decode_attention:cpu"] == before + 1
        expected, expected_lse = decode_attention(query, key, value)
    assert torch.equal(out, 2 * expected)
    assert torch.equal(lse, expected_lse)


def test_grad_mode_without_gradients_gives_the_same_bits():
    arguments = inputs()
    with torch.no_grad():
        expected = decode_attention(*arguments)
    assert all(map(torch.equal, decode_attention(*arguments), expected))
    with torch.inference_mode():
        inside = [a.clone() if a is not None else a for a in arguments]
        assert all(map(torch.equal, decode_attention(*inside), expected))


def test_tracing_and_dispatch_modes_see_the_op():
    query, key, value, *_ = inputs()
    with torch.no_grad():
        traced = torch.jit.trace(decode_attention_of, (query, key, value))
        assert "adaptive::decode_attention" in str(traced.inlined_graph)
        other = 2 * query
        assert torch.equal(traced(other, key, value), decode_attention_of(other, key, value))

        class Watch(TorchDispatchMode):
            seen = ()

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.seen = (*self.seen, function)
                return function(*args, **(kwargs or {}))

        with Watch() as watch:
            decode_attention(query, key, value)
        assert torch.ops.adaptive.decode_attention.default in watch.seen


def decode_attention_of(query, key, value):
    return decode_attention(query, key, value)[0]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_gradient_is_refused_not_dropped(position):
    arguments = list(inputs())
    arguments[position].requires_grad_()
    with pytest.raises(NotImplementedError, match="has no backward"):
        decode_attention(*arguments)
    out, _ = decode_attention.reference(*arguments)
    out.sum().backward()
    assert arguments[position].grad is not None


def test_parameters_and_named_arguments_are_taken():
    query, key, value, *_ = inputs()
    frozen = torch.nn.Parameter(query, requires_grad=False)
    expected = decode_attention(query, key, value)
    assert all(map(torch.equal, decode_attention(frozen, key, value), expected))
    named = decode_attention(query=query, value=value, key=key)
    assert all(map(torch.equal, named, expected))


@pytest.mark.parametrize("grad", [False, True])
def test_meta_tensors_say_shapes_only(grad):
    with torch.set_grad_enabled(grad):
        out, lse = decode_attention(*(a if a is None else a.to("meta") for a in inputs()))
    assert out.shape == (1, 4, 1, 64)
    assert lse.device.type == "meta"


@pytest.mark.parametrize("grad", [False, True])
def test_a_layout_without_a_kernel_is_refused_not_computed_slowly(grad):
    query, key, value, *_ = inputs()
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="query must be a strided"):
        decode_attention(query.to_sparse(), key, value)


@pytest.mark.parametrize("call", [decode_attention, "into"], ids=["op", "into"])
def test_a_new_thread_obeys_set_num_threads(call):
    """The kernel asks OpenMP, whose number of threads is each calling thread's own."""
    openmp = ctypes.CDLL(_native.__file__)  # finds what the kernel links to
    query, key, value, *_ = inputs()
    outputs = decode_attention.outputs(query, key, value)
    seen = []

    def attend():
        torch.set_grad_enabled(False)
        seen.append(openmp.omp_get_max_threads())
        if call == "into":
            decode_attention.into(*outputs, query=query, key=key, value=value)
        else:
            call(query, key, value)
        seen.append(openmp.omp_get_max_threads())

    def in_a_new_thread(threads):
        torch.set_num_threads(threads)
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()

    before = torch.get_num_threads()
    try:
        in_a_new_thread(before)
        wanted = seen[0] + 1  # not what a new thread has anyway
        in_a_new_thread(wanted)
    finally:
        torch.set_num_threads(before)
    assert seen[-1] == wanted


def test_overhead_of_an_eager_call_is_about_that_of_an_allocation():
    """The call with its outputs given: views of five tensors, and checks.

    torch.empty is the yardstick,
    because absolute times say more about the machine than about the call.
    """
    query, key, value, *_ = inputs(capacity=0)
    lengths = torch.zeros(1, dtype=torch.int32)
    out, lse = decode_attention.outputs(query, key, value)
    fill = _native.decode_attention

    def median_ns(call, count=400):
        times = []
        for _ in range(15):
            start = time.thread_time_ns()
            for _ in range(count):
                call()
            times.append((time.thread_time_ns() - start) / count)
        return statistics.median(times)

    native = median_ns(lambda: fill(out, lse, None, query, key, value, lengths))
    allocation = median_ns(lambda: torch.empty(64))
    assert native < 3 * allocation, f"{native:.0f} ns against {allocation:.0f} ns"
