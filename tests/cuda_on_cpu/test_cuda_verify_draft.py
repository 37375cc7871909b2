"""The CUDA kernel of verify_draft, run on the CPU, against its reference; and bugs planted."""

import ctypes

import pytest
import torch
from guarded import Guarded, call, prepare
from simulated import ROOT, planted, pointer

from adaptive.ops import verify_draft

SOURCE = "cuda/verify_draft.cu"
OTHERS = [ROOT / "csrc/cuda/verify_samples.cu", ROOT / "tests/cuda_on_cpu/verify_shim.cpp"]
UNWRITTEN = 7777777


class DraftArgs(ctypes.Structure):
    """VerifyDraftArgs of csrc/verify_draft.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("drafted", "choices", "parents", "lengths")),
        *((name, ctypes.c_void_p) for name in ("accepted", "path", "tokens")),
        *((name, ctypes.c_int64) for name in ("batch", "nodes")),
        *((name, ctypes.c_int64) for name in ("drafted_stride", "choices_stride")),
    )


class Draft:
    """verify_draft as CUDA would run it; checks that nothing around the outputs is written."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        prepare(library, "draft_args_bytes", DraftArgs)

    def __call__(self, drafted, choices, parents=None, lengths=None):
        batch, nodes = drafted.shape
        shapes = [(batch,), (batch, nodes + 1), (batch, nodes + 1)]
        outputs = [Guarded(shape, torch.int64, UNWRITTEN) for shape in shapes]
        made = [output.inside for output in outputs]
        args = DraftArgs(
            *map(pointer, (drafted, choices, parents, lengths, *made)),
            batch, nodes, drafted.stride(0), choices.stride(0),
        )  # fmt: skip
        call(self.library, "verify_draft", args, *outputs)
        return made


@pytest.fixture
def draft(builder):
    return Draft(builder.library(*builder.objects(ROOT / "csrc" / SOURCE, *OTHERS)))


def check(draft, *arguments):
    for made, right in zip(draft(*arguments), verify_draft.reference(*arguments), strict=True):
        assert torch.equal(made, right)


def draw(sizes, tokens, seed=0):
    """Few different tokens, so that several nodes fit and some walks are long."""
    drafted, choices, parents, lengths = verify_draft.make_inputs(**sizes, device="cpu", seed=seed)
    return drafted % tokens, choices % tokens, parents, lengths


@pytest.mark.parametrize("sizes", verify_draft.edges, ids=str)
def test_edges(draft, sizes):
    check(draft, *verify_draft.make_inputs(**sizes, device="cpu"))


def check_everything(draft):
    """Enough to notice a small bug."""
    for seed in range(3):
        draft.library.set_seed(seed)
        for sizes in verify_draft.edges:
            for tokens in (1, 2, 3):
                check(draft, *draw(sizes, tokens, seed))
    drafted, choices, parents, lengths = draw({"batch": 5, "nodes": 9, "tree": True}, 2)
    wide = torch.full((5, 30), -7)
    wide[:, 2:11], wide[:, 15:25] = drafted, choices
    check(draft, wide[:, 2:11], wide[:, 15:25], parents)
    # A child listed before a later node of the same token, and a sibling that only comes later.
    check(
        draft, torch.tensor([[5, 5, 6, 6, 7]]), torch.tensor([[5, 6, 6, 0, 7, 9]]),
        torch.tensor([[-1, -1, 1, 0, 3]]),
    )  # fmt: skip
    # A parent out of range counts as the context.
    for parent in (-2, 0, 1, 2**40):
        accepted, path, _ = draft(
            torch.tensor([[4]]), torch.tensor([[4, 6]]), torch.tensor([[parent]])
        )
        assert accepted.tolist() == [1]
        assert path.tolist() == [[0, -1]]
    # A length out of range spoils its row and no other.
    lengths = torch.tensor([9, -1, 10, 0, 4])
    made, good = draft(drafted, choices, parents, lengths), [0, 3, 4]
    expected = verify_draft.reference(
        drafted[good], choices[good], parents[good].contiguous(), lengths[good]
    )
    for all_rows, right in zip(made, expected, strict=True):
        assert torch.equal(all_rows[good], right)
        assert (all_rows[[1, 2]] == -1).all()


def test_trees_lists_strides_and_bad_data(draft):
    check_everything(draft)


MUTANTS = {
    "rows beyond the last": ("if (row >= a.batch) return;", "if (row > a.batch) return;"),
    "a length too large taken": ("&& length <= a.nodes;", ";"),
    "a length below zero taken": ("length >= 0 && ", ""),
    "nodes beyond the length": ("real = node < length", "real = node < a.nodes"),
    "parents above the node": ("parent < -1 || parent >= node", "parent < -1"),
    "parents below the context": ("parent < -1 || parent >= node", "parent >= node"),
    "parent not compared": ("&& parent == here", ""),
    "a token other than the choice": ("token == choice", "token >= choice"),
    "the last of twins": ("__ffs(static_cast<int>(fits)) - 1", "31 - __builtin_clz(fits)"),
    "the choice before": ("after = choices[node + 1]", "after = choices[node]"),
    "choice of another node": ("__shfl_sync(~0u, after, next)", "__shfl_sync(~0u, after, 0)"),
    "path without its 32": ("path[accepted] = first + next;", "path[accepted] = next;"),
    "no token at the end": ("valid && i == accepted ? choice : -1", "-1"),
    "the rest not filled": ("i += kLanes) {", "i += 2 * kLanes) {"),
    "rows assumed dense": ("row * a.drafted_stride", "row * a.nodes"),
    "choices assumed dense": ("row * a.choices_stride", "row * (a.nodes + 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, SOURCE, *MUTANTS[name])
    draft = Draft(builder.library(*builder.objects(mutant, *OTHERS)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(draft)
