"""The CUDA kernel of verify_samples, run on the CPU, against its reference; and bugs planted."""

import ctypes

import pytest
import torch
from guarded import Guarded, call, prepare
from simulated import ROOT, planted, pointer

from adaptive.ops import verify_samples

SOURCE = "cuda/verify_samples.cu"
OTHERS = [ROOT / "csrc/cuda/verify_draft.cu", ROOT / "tests/cuda_on_cpu/verify_shim.cpp"]
UNWRITTEN = 7777777


class SamplesArgs(ctypes.Structure):
    """VerifySamplesArgs of csrc/verify_samples.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("drafted", "draft_probs", "target_probs")),
        *((name, ctypes.c_void_p) for name in ("uniforms", "lengths", "accepted", "tokens")),
        *((name, ctypes.c_int64) for name in ("batch", "nodes", "vocab", "drafted_stride")),
        ("draft_stride", ctypes.c_int64 * 2),
        ("target_stride", ctypes.c_int64 * 2),
        ("uniforms_stride", ctypes.c_int64),
    )


class Samples:
    """verify_samples as CUDA would run it; checks that nothing around the outputs is written."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        prepare(library, "samples_args_bytes", SamplesArgs)

    def __call__(self, drafted, draft, target, uniforms, lengths=None):
        batch, nodes = drafted.shape
        shapes = [(batch,), (batch, nodes + 1)]
        outputs = [Guarded(shape, torch.int64, UNWRITTEN) for shape in shapes]
        made = [output.inside for output in outputs]
        args = SamplesArgs(
            *map(pointer, (drafted, draft, target, uniforms, lengths, *made)),
            batch, nodes, target.shape[2], drafted.stride(0), draft.stride()[:2],
            target.stride()[:2], uniforms.stride(0),
        )  # fmt: skip
        call(self.library, "verify_samples", args, *outputs)
        return made


@pytest.fixture
def samples(builder):
    return Samples(builder.library(*builder.objects(ROOT / "csrc" / SOURCE, *OTHERS)))


def check(samples, *arguments):
    expected = verify_samples.reference(*arguments)
    for made, right in zip(samples(*arguments), expected, strict=True):
        assert torch.equal(made, right)


@pytest.mark.parametrize("sizes", verify_samples.edges, ids=str)
def test_edges(samples, sizes):
    check(samples, *verify_samples.make_inputs(**sizes, device="cpu"))


def draw(seed, **sizes):
    return list(verify_samples.make_inputs(**sizes, device="cpu", seed=seed))


def check_draws(samples):
    """Tokens of weight 0, sums that a uniform meets exactly, the first and the last token."""
    for vocab in (1, 31, 32, 33, 600, 2100):
        weights = torch.zeros(7, 1, vocab)
        weights[..., ::3] = 1 / 4096
        weights[2:4, :, -1] = 0
        weights[4:6, :, : vocab // 2] = 0
        weights[:, :, vocab // 2] = 1 / 4096
        uniforms = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 0.25, 1 - 2**-24])[:, None]
        nothing = torch.empty(7, 0).long(), torch.empty(7, 0, vocab)
        check(samples, *nothing, weights, uniforms)
    # Pieces of pieces of more than 32 tokens, met exactly by the first six.
    uniforms = torch.tensor([1 / 32, 3 / 32, 0.125, 0.5, 0.75, 31 / 32, 0.3, 0.9])[:, None]
    nothing = torch.empty(8, 0).long(), torch.empty(8, 0, 12000)
    check(samples, *nothing, torch.full((8, 1, 12000), 2.0**-14), uniforms)


def check_refusals(samples):
    """What is wrong with a row spoils this row and no other."""
    for index, place, value in (
        (0, (3, 1), 40), (0, (3, 1), -1), (1, (3,), torch.nan), (1, (3,), -1.0),
        (2, (3,), torch.inf), (2, (3,), 0.0), (3, (3, 0), 1.5), (3, (3, 4), torch.nan),
        (4, (3,), 5), (4, (3,), -1),
    ):  # fmt: skip
        arguments = draw(2, batch=5, nodes=4, vocab=40)
        arguments[4] = torch.tensor([4, 2, 0, 3, 4])
        right = verify_samples.reference(*arguments)
        arguments[index][place] = value
        accepted, tokens = samples(*arguments)
        assert accepted[3] == -1
        assert (tokens[3] == -1).all()
        good = [0, 1, 2, 4]
        assert torch.equal(accepted[good], right[0][good])
        assert torch.equal(tokens[good], right[1][good])
    # At a token that was not drafted, but may be drawn.
    for index in (1, 2):
        for value in (torch.nan, torch.inf, -0.25):
            half, target = torch.full((1, 1, 3), 0.5), torch.tensor([[[0.0, 0.5, 1], [1, 0, 0]]])
            arguments = [torch.zeros(1, 1).long(), half, target, torch.full((1, 2), 0.5)]
            arguments[index][0, 0, 2] = value
            assert samples(*arguments)[0].tolist() == [-1]
    # Alone at a drafted token, which the draw does not look at, and a token behind the rejection.
    arguments = draw(2, batch=1, nodes=2, vocab=40)
    arguments[1][0, 0, arguments[0][0, 0]] = -0.5
    assert samples(*arguments)[0].tolist() == [-1]
    arguments = draw(2, batch=1, nodes=2, vocab=40)
    arguments[2][0, 0, arguments[0][0, 0]], arguments[0][0, 1] = 0, 40
    assert samples(*arguments)[0].tolist() == [-1]


def check_everything(samples):
    """Enough to notice a small bug."""
    for seed in range(3):
        samples.library.set_seed(seed)
        for sizes in ({"nodes": 5, "vocab": 40}, {"nodes": 3, "vocab": 3000},
                      {"nodes": 40, "vocab": 9}):  # fmt: skip
            for ragged in (False, True):
                drafted, draft, target, uniforms, lengths = draw(
                    seed, batch=9, ragged=ragged, **sizes
                )
                check(samples, drafted, draft, target, uniforms, lengths)
                target[:, :1] = target[:, 1:2]
                check(samples, drafted, draft, target, uniforms * 2 % 1, lengths)
    drafted, draft, target, uniforms, _ = draw(7, batch=3, nodes=4, vocab=20)
    spread = torch.full((5, 3, 33), torch.nan)
    spread[..., 5:25] = target.transpose(0, 1)
    apart = torch.full((4, 3, 31), torch.nan)
    apart[..., 5:25] = draft.transpose(0, 1)
    wide = torch.full((3, 11), torch.nan)
    wide[:, 2:7] = uniforms
    far = torch.full((3, 9), -5)
    far[:, 3:7] = drafted
    check(
        samples, far[:, 3:7], apart[..., 5:25].transpose(0, 1),
        spread[..., 5:25].transpose(0, 1), wide[:, 2:7],
    )  # fmt: skip
    # Nothing is left of the target.
    half = torch.full((2, 1, 2), 0.5)
    target = torch.tensor([[[0.25, 0.5], [1.0, 0.0]]]).expand(2, 2, 2)
    uniforms = torch.tensor([[0.75, 0.25], [0.75, 0.5]])
    check(samples, torch.zeros(2, 1).long(), half, target, uniforms)
    # A decision that is met exactly.
    target = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]]).expand(2, 2, 2)
    check(samples, torch.zeros(2, 1).long(), half, target, torch.full((2, 2), 0.5))
    check_draws(samples)
    check_refusals(samples)


def test_drafts_draws_strides_and_bad_data(samples):
    check_everything(samples)


def test_refusals_name_the_argument(samples):
    arguments = draw(0, batch=1, nodes=1, vocab=9)
    arguments[1], arguments[2] = arguments[1][..., :0], arguments[2][..., :0]
    with pytest.raises(RuntimeError, match="adaptive::verify_samples: target_probs must have 1"):
        samples(*arguments)


MUTANTS = {
    "accepted where p / q is met": ("stops = !(", "stops = (static_cast<double>(uniforms[node]) * "
                                    "static_cast<double>(q) > static_cast<double>(p)) && !("),
    "the last rejection counts": ("stopping != 0 && accepted == length", "stopping != 0"),
    "draws from p after a rejection": ("if (accepted == length) weights.q", "weights.q"),
    "draws from p - q after all": ("if (accepted == length) weights.q", "if (false) weights.q"),
    "negative weights kept": ("return left > 0.0 ? left : 0.0;", "return left;"),
    "the draw reuses a decision": ("a.uniforms[row * a.uniforms_stride + a.nodes]) * total",
                                   "a.uniforms[row * a.uniforms_stride]) * total"),
    "no way out where nothing is left": ("total != 0.0 || !weights.q", "true"),
    "sums met count": ("found = sum + sums[w] > bound", "found = sum + sums[w] >= bound"),
    "tokens met count": ("before + sum > bound", "before + sum >= bound"),
    "pieces without weight chosen": ("!found && sums[w] > 0.0", "!found"),
    "the sum before a piece forgotten": ("chosen.before = sum;", ""),
    "the sum of 32 tokens forgotten": ("before += __shfl_sync(~0u, sum, kLanes - 1);", ""),
    "no barrier after the sums": ("sums[warp] = sum;\n  __syncthreads();", "sums[warp] = sum;"),
    "no barrier before the sums": (
        "__syncthreads();  // whoever still reads the sums of the range before", ""),
    "tokens not checked": ("token >= 0 && token < a.vocab &&", "token >= 0 && token <= a.vocab &&"),
    "probabilities of tokens not checked": ("good = is_weight(p) && is_weight(q);", ""),
    "probabilities not checked": ("if (!is_weight(mine) || !is_weight(other)) return kNaN;", ""),
    "uniform of the draw not checked": ("fine = is_uniform(uniforms[a.nodes]);", "fine = true;"),
    "only 32 nodes": ("first < length; first", "first < min(length, int64_t{32}); first"),
    "the rest of the tokens kept": ("i == accepted ? drawn : -1", "i >= accepted ? drawn : -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, SOURCE, *MUTANTS[name])
    samples = Samples(builder.library(*builder.objects(mutant, *OTHERS)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(samples)
