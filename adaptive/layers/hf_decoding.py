"""One call of `generate`, as transformers hands it to a way of decoding of its caller."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaptive.layers.hf_inputs import cache_and_mask
from adaptive.layers.hf_rows import Rows


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What a decoding loop is asked for; all but the model as `generate` prepared it.

    Attributes:
        model: A patched model.
        input_ids: The prompt, ``[batch, tokens]``, padded on the left.
        processors: Of logits.
        criteria: That end a row.
        config: Of the generation.
        synced_gpus: Whether ranks must make the same number of passes, which they do not.
        streamer: Gets each token; `generate` has given it the prompt.
        keeps_cache: Whether the caller holds the cache.
        given: Arguments of the model.
    """

    model: Any
    input_ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    synced_gpus: bool
    streamer: Any
    keeps_cache: bool
    given: dict[str, Any]

    @property
    def as_dict(self) -> bool:
        """Whether the answer is a dict, which holds the cache."""
        return bool(self.config.return_dict_in_generate)

    def cache_and_mask(self, policy: str) -> tuple[Cache, Tensor | None]:
        """See `hf_inputs.cache_and_mask`."""
        return cache_and_mask(policy, self.input_ids, self.given, self.synced_gpus)

    def rows(self) -> Rows:
        """The rows of the prompt, to which tokens are added."""
        return Rows(self.input_ids, self.processors, self.criteria, self.config, self.streamer)

    def answer(self, sequences: Tensor, cache: Cache | None = None) -> Any:
        """What `generate` returns: ``[batch, tokens]``, or the dict that was asked for."""
        made: Any = sequences
        if self.as_dict:
            return GenerateDecoderOnlyOutput(sequences=made, past_key_values=cache)
        return made


Loop = Callable[[Decoding], Any]


@torch.no_grad()
def decode_by(  # noqa: PLR0913 - the signature that transformers calls
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    loop: Loop,
    keeps_cache: bool,
    **model_kwargs: Any,
) -> Any:
    """Decode by ``loop``; the other arguments are those of a `Decoding`."""
    return loop(
        Decoding(
            model=model,
            input_ids=input_ids,
            processors=logits_processor,
            criteria=stopping_criteria,
            config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            keeps_cache=keeps_cache,
            given=model_kwargs,
        )
    )
