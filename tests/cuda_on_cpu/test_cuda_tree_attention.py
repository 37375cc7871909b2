"""The CUDA kernels of tree_attention, run on the CPU, against the masked formula; planted bugs."""

import pytest
import torch
from simulated import ROOT, Simulated, assert_close, planted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEYS, MMA = "cuda/tree_attention.cuh", "cuda/tree_attention_mma.cu"
TREE_SOURCES = [
    ROOT / "csrc" / MMA,
    ROOT / "csrc/cuda/tree_attention.cu",
    ROOT / "tests/cuda_on_cpu/tree_shim.cpp",
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Tree(Simulated):
    """tree_attention as CUDA would run it."""

    entry, wants = "tree_attention", "tree_workspace_bytes"


@pytest.fixture
def tree(builder, objects):
    return Tree(builder.library(*objects, *builder.objects(*TREE_SOURCES)))


def draw(dtype, *, group=2, nodes=16, tokens=150, head_dim=64, batch=2):
    """Query, key, value and parents, each parent as likely as any other."""
    rng = torch.Generator().manual_seed(hash((group, nodes, tokens, head_dim)))
    sizes = ((batch, 2 * group, nodes, head_dim), *((batch, 2, tokens, head_dim),) * 2)
    tensors = [torch.randn(size, generator=rng).to(dtype) for size in sizes]
    chance = torch.rand(batch, nodes, generator=rng)
    return tensors, (torch.arange(1, nodes + 1) * chance).floor().long() - 1


def seen(parents, tokens, mask=None):
    """Which keys each node sees, ``[batch, 1, nodes, tokens]``."""
    batch, nodes = parents.shape
    made = torch.ones(batch, 1, nodes, tokens, dtype=torch.bool)
    made[..., tokens - nodes :] = False
    for row, node in torch.ones(batch, nodes).nonzero().tolist():
        up = node
        while up >= 0:
            made[row, 0, node, tokens - nodes + up] = True
            up = int(parents[row, up])
    return made if mask is None else made & mask


def check(tree, tensors, parents, *, mask=None, given=None, **options):
    """`given`: the parents to pass on, where they mean `parents`."""
    given = parents if given is None else given
    out, lse = tree(*tensors, parents=given, mask=mask, **options)
    dense = seen(parents, tensors[1].shape[2], mask)
    clean = [t.nan_to_num(0.0) for t in tensors]  # the formula multiplies hidden values
    assert_close(out, lse, *clean, mask=dense, causal=False, **options)
    return out, lse


@every_dtype
@pytest.mark.parametrize(("nodes", "group"), [(1, 1), (2, 4), (5, 7), (13, 2), (16, 5)])
def test_nodes_and_groups(tree, dtype, nodes, group):
    """One to eighty rows per KV head: one, two and four tiles of rows, one and two blocks."""
    check(tree, *draw(dtype, nodes=nodes, group=group, batch=1, tokens=90))


@every_dtype
@pytest.mark.parametrize("tokens", [16, 17, 63, 64, 65, 75, 80, 130])
def test_where_the_context_ends(tree, dtype, tokens):
    for multiprocessors in (1, 24):
        tree.set_device(multiprocessors)
        check(tree, *draw(dtype, tokens=tokens, batch=1))


@every_dtype
@pytest.mark.parametrize("head_dim", [32, 72, 128, 256])
def test_head_dims(tree, dtype, head_dim):
    check(tree, *draw(dtype, head_dim=head_dim, batch=1), softcap=3.0)


@every_dtype
def test_a_chain_gives_the_bits_of_decode_attention(builder, objects, tree, dtype):
    decode = Simulated(builder.library(*objects))
    for multiprocessors in (1, 24):
        tree.set_device(multiprocessors)
        decode.set_device(multiprocessors)
        tensors, parents = draw(dtype, nodes=13, group=3)
        chain = (torch.arange(13) - 1).expand(2, -1).contiguous()
        assert parents.shape == chain.shape
        made, right = check(tree, tensors, chain), decode(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))


def test_refusals_name_the_op(tree):
    tensors, parents = draw(torch.float32, tokens=900)
    with pytest.raises(RuntimeError, match="adaptive::tree_attention: workspace must hold"):
        tree(*tensors, parents=parents, short_workspace=4)


def check_everything(tree, dtype):
    """Enough to notice a small bug."""
    for multiprocessors in (1, 24):
        tree.set_device(multiprocessors)
        for nodes, group, tokens in ((16, 1, 16), (13, 2, 100), (16, 5, 76), (3, 1, 150)):
            tensors, parents = draw(dtype, nodes=nodes, group=group, tokens=tokens)
            made = check(tree, tensors, parents)
            tree.set_seed(1)
            again = tree(*tensors, parents=parents)
            tree.set_seed(0)
            assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
            chain = (torch.arange(nodes) - 1).expand(2, -1).contiguous()
            check(tree, tensors, chain)
            check(tree, tensors, torch.full_like(parents, -1))
            hidden = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
            hidden[0, ..., 2:9] = hidden[1, ..., -2] = False
            check(tree, tensors, parents, mask=hidden)
    # A node whose key and value are NaN spoils itself and what follows it. In a tile of rows that
    # holds none of these, its value must not be multiplied by a weight of 0.
    tensors, parents = draw(dtype, nodes=13, group=2, tokens=70, batch=1)
    parents[:] = -1
    for tensor in tensors[1:]:
        tensor[:, :, 57] = torch.nan
    out, _ = tree(*tensors, parents=parents)
    rows = torch.arange(26)[16:]  # of each KV head: tokens 3..12 of its second head
    assert (rows % 13 > 0).all()
    assert not out.view(1, 2, 26, 64)[:, :, rows].isnan().any()
    # Parents out of range count as the context.
    tensors, parents = draw(dtype, nodes=9, tokens=40)
    parents[:, 1:] = torch.arange(8)
    meant, given = parents.clone(), parents.clone()
    for node, parent in ((2, 2), (4, -2), (5, 8), (7, 2**40)):
        meant[:, node], given[:, node] = -1, parent
    check(tree, tensors, meant, given=given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_trees_masks_and_bad_parents(tree, dtype):
    check_everything(tree, dtype)


MUTANTS = {
    "too few rounds": ("seen < kMostNodes; seen *= 2", "seen < kMostNodes / 2; seen *= 2"),
    "not itself": ("ancestors_ = 1u << lane;", "ancestors_ = 0;"),
    "parents not followed": ("up = __shfl_sync(~0u, up, from);", ""),
    "parents of the first row": ("[share.batch * nodes + lane]", "[lane]"),
    "parents after the node": ("parent_ >= 0 && parent_ < lane", "parent_ >= 0 && parent_ < 32"),
    "ancestors of another row": ("ancestors_, row.token)", "ancestors_, row.token / 2)"),
    "nodes begin one too early": ("p.args.query_tokens);\n  }\n\n  int64_t",
                                  "p.args.query_tokens) - 1;\n  }\n\n  int64_t"),
    "a node's key seen by all": ("p.args.mask ? 0 : first_node(p, share)",
                                 "p.args.mask ? 0 : first_node(p, share) + 16"),
    "hidden nodes multiplied": ("|| first + p.plan.tile_keys > first_node(p, share)", ""),
    "siblings seen": ("(node >= 0 && (sight.nodes >> node & 1) == 0)",
                      "(node >= 0 && sight.nodes >> node == 0)"),
    "mask ignored": ("sight.masked(p.args, score, first + k)", "score"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, objects, tmp_path, name):
    source = planted(tmp_path / "csrc", MMA, KEYS, *MUTANTS[name])
    kept = builder.objects(*TREE_SOURCES[1:])
    tree = Tree(builder.library(*builder.objects(source), *kept, *objects))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(tree, torch.bfloat16)
