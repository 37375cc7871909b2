# Types of the native module; adaptive.ops documents what the functions do.
from torch import Tensor

cuda: bool

def advise_huge_pages(tensor: Tensor) -> None: ...
def best_cpu_level() -> str: ...
def calls() -> dict[str, int]: ...
def cpu_level() -> str: ...
def set_cpu_level(level: str) -> None: ...
def block_sparse_attention(
    out: Tensor,
    lse: Tensor,
    workspace: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int = 64,
    offsets: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> int: ...
def combine_tokens(
    out: Tensor,
    workspace: Tensor | None,
    hidden: Tensor,
    update: Tensor,
    tokens: Tensor,
    weights: Tensor | None = None,
) -> int: ...
def decode_attention(
    out: Tensor,
    lse: Tensor,
    workspace: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    cache_rows: Tensor | None = None,
) -> int: ...
def exit_confidence(
    tokens: Tensor,
    top: Tensor,
    lse: Tensor,
    entropy: Tensor,
    workspace: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    weight_scales: Tensor | None = None,
) -> int: ...
def gather_attention(
    out: Tensor,
    lse: Tensor,
    workspace: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    extra_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    page_size: int = 1,
) -> int: ...
def gather_tokens(out: Tensor, workspace: Tensor | None, hidden: Tensor, tokens: Tensor) -> int: ...
def local_attention(
    out: Tensor,
    lse: Tensor,
    workspace: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    windows: Tensor | None = None,
    sinks: int = 0,
    offsets: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> int: ...
def merge_tokens(
    out: Tensor,
    out_sizes: Tensor,
    groups: Tensor,
    workspace: Tensor | None,
    hidden: Tensor,
    metric: Tensor,
    removed: int,
    sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    counts: Tensor | None = None,
    protect: int = 1,
) -> int: ...
def pool_blocks(
    means: Tensor,
    workspace: Tensor | None,
    source: Tensor,
    block_size: int = 64,
    offsets: Tensor | None = None,
) -> int: ...
def prefix_row_ffn(
    out: Tensor,
    workspace: Tensor | None,
    input: Tensor,
    widths: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str = "silu",
) -> int: ...
def route_tokens(
    tokens: Tensor,
    counts: Tensor,
    slots: Tensor,
    workspace: Tensor | None,
    scores: Tensor,
    threshold: float | None = None,
    capacity: float | None = None,
    valid: Tensor | None = None,
) -> int: ...
def router_scores(
    scores: Tensor,
    workspace: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    function: str = "sigmoid",
) -> int: ...
def score_tokens(
    scores: Tensor,
    lse: Tensor,
    workspace: Tensor | None,
    query: Tensor,
    key: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    reduce: str = "sum",
) -> int: ...
def scored_attention(
    out: Tensor,
    lse: Tensor,
    scores: Tensor,
    workspace: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    reduce: str = "sum",
) -> int: ...
def select_tokens(
    indices: Tensor,
    counts: Tensor,
    workspace: Tensor | None,
    scores: Tensor,
    budget: int,
    lengths: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    mass: float = 1.0,
) -> int: ...
def skinny_linear(
    out: Tensor,
    workspace: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_scales: Tensor | None = None,
) -> int: ...
def sparse_row_ffn(
    out: Tensor,
    workspace: Tensor | None,
    activations: Tensor,
    input: Tensor,
    up: Tensor,
    down: Tensor,
) -> int: ...
def sum_tokens(
    sums: Tensor,
    workspace: Tensor | None,
    source: Tensor,
    indices: Tensor,
    counts: Tensor,
) -> int: ...
def tree_attention(
    out: Tensor,
    lse: Tensor,
    workspace: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parents: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> int: ...
def verify_draft(
    accepted: Tensor,
    path: Tensor,
    tokens: Tensor,
    workspace: Tensor | None,
    drafted: Tensor,
    choices: Tensor,
    parents: Tensor | None = None,
    lengths: Tensor | None = None,
) -> int: ...
def verify_samples(
    accepted: Tensor,
    tokens: Tensor,
    workspace: Tensor | None,
    drafted: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    lengths: Tensor | None = None,
) -> int: ...
