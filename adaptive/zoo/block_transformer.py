"""Block Transformer: global attention between blocks of tokens, local attention within them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.layers.kv_store import KVStore
from adaptive.zoo.config import BlockTransformerConfig
from adaptive.zoo.decoder import Decoder, Linear, initialise
from adaptive.zoo.model import ZooModel
from adaptive.zoo.run import DecoderRun, KVCast, Run, padded


class BlockTransformer(ZooModel):
    """Ho et al. 2024, "Block Transformer: Global-to-Local Language Modeling", arXiv:2406.02657.

    Three parts. The *embedder* concatenates narrow embeddings of the ``block_length`` tokens of a
    block. The *block decoder* attends causally over blocks; it has one KV entry per block, and its
    output for a block is what is known when the next one begins. The *token decoder* sees that
    through ``prefix_length`` vectors and attends to them and to the tokens of its own block alone:
    its KV dies with the block, and a prompt never runs through it.

    A sequence that does not begin at a block's first place is padded on its left, with a token of
    its own. ``generate`` pads a prompt so that it ends with a block. What is told of the first
    block starts from a learned context.
    """

    config_type = BlockTransformerConfig
    config: BlockTransformerConfig

    def __init__(self, config: BlockTransformerConfig) -> None:
        """Draw the weights."""
        super().__init__(config)
        self.block_length = config.block_length
        rows = config.vocab_size + 1  # the last one is padding
        self.block_embedding = nn.Embedding(rows, config.width // config.block_length)
        self.block_decoder = Decoder(config, config.block_layers)
        self.start = nn.Parameter(torch.randn(config.width))  # of the size of a normed context
        self.prefix = Linear(config.width, config.prefix_length * config.width)
        self.token_embedding = nn.Embedding(rows, config.width)
        self.token_decoder = Decoder(config, config.token_layers)
        self.head = Linear(config.width, config.vocab_size)
        initialise(self, config.block_layers + config.token_layers)

    @property
    def kv_layers(self) -> int:
        """Layers with a KV cache: those of the block decoder."""
        return self.config.block_layers

    def forward(self, ids: Tensor, *, padding: int = 0) -> Tensor:
        """Return the logits of each next token, with the true tokens before it.

        Args:
            ids: ``[batch, tokens]``, int32 or int64.
            padding: Places of the first block that lie before the sequence, below
                ``block_length``. ``generate`` leaves ``-tokens % block_length``.

        Returns:
            ``[batch, tokens, vocab_size]``.

        Raises:
            ValueError, TypeError, IndexError: The ids' shape, dtype or range is wrong.
        """
        self._check_batch(ids)
        length = self.block_length
        if type(padding) is not int or not 0 <= padding < length:
            raise ValueError(f"adaptive::zoo: padding must be in [0, {length}), got {padding!r}")
        tokens = padding + ids.shape[1]
        blocks = tokens // length
        behind = (blocks + 1) * length - tokens
        grid = F.pad(ids, (padding, behind), value=self.config.vocab_size)
        grid = grid.view(len(ids), blocks + 1, length)
        contexts = self.start.expand(len(ids), 1, -1)
        if blocks:
            told = self.block_decoder(self._embed(grid[:, :blocks]))
            contexts = torch.cat([contexts, told], 1)
        # A block's last token tells of the next block through the block decoder alone.
        inside = self.token_embedding(grid[..., : length - 1])
        x = torch.cat([self._prefix(contexts), inside], 2).flatten(0, 1)
        hidden = self.token_decoder(x)[:, self.config.prefix_length - 1 :]
        hidden = hidden.reshape(len(ids), (blocks + 1) * length, -1)
        return self.head(hidden[:, padding + 1 : tokens + 1])  # type: ignore[no-any-return]

    def _embed(self, grid: Tensor) -> Tensor:
        return self.block_embedding(grid).flatten(2)  # type: ignore[no-any-return]

    def _prefix(self, contexts: Tensor) -> Tensor:
        vectors: Tensor = self.prefix(contexts).unflatten(-1, (self.config.prefix_length, -1))
        return vectors

    def _start(self, prompts: Sequence[Tensor], new_tokens: int, kv_dtype: torch.dtype) -> Run:
        grid, first = padded(prompts, self.block_length, self.config.vocab_size)
        entries = grid.shape[1] + -(-new_tokens // self.block_length)
        run = _BlockRun(self.block_decoder, self._embed, grid, first, entries, kv_dtype)
        run.begin(self)
        return run


class _BlockRun(DecoderRun):
    """Contexts come from the block decoder; the token decoder's few KV entries are reused."""

    def begin(self, model: BlockTransformer) -> None:
        """Make the stores of the token decoder."""
        self.model = model
        most = model.config.prefix_length + model.block_length - 1
        self.inside = [KVStore(most) for _ in range(model.config.token_layers)]

    def logits(self, previous: Tensor | None) -> Tensor:
        """Run the prefix, or the token chosen before, through the token decoder."""
        model = self.model
        if previous is None:
            x = model._prefix(self.context)
            for store in self.inside:
                store.crop(0)
        else:
            x = model.token_embedding(previous[:, None])
        stores = [KVCast(store, self.kv_dtype) for store in self.inside]
        return model.head(model.token_decoder(x, stores, last_only=True)[:, 0])  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        super().keep(rows)
        for store in self.inside:
            store.reset()
