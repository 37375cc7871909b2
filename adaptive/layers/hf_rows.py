"""The rows of one `generate` call: their tokens, how the next one is chosen, and when they end."""

from typing import Any

import torch
from torch import Tensor

from adaptive.layers.speculative_sampling import accept_greedy, accept_sampled

_PER_BATCH = ("PrefixConstrainedLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


class Rows:
    """Tokens of each row, which may have different lengths.

    Attributes:
        prompt: ``[batch, tokens]``.
        batch: Rows.
        alive: Which rows are not finished, ``[batch]``, on the CPU.
    """

    def __init__(
        self, prompt: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any
    ) -> None:
        """Start with the prompt; the rest is as `generate` prepared it.

        Raises:
            NotImplementedError: A logits processor knows rows by their place in the batch.
        """
        self.prompt = prompt
        self.batch = len(prompt)
        self.alive = torch.ones(self.batch, dtype=torch.bool)
        self._processors = processors
        self._criteria = criteria
        self._streamer = streamer
        self._sample = bool(config.do_sample)
        self._most = int(criteria.max_length or config.max_length)
        self._pad: Any = getattr(config, "_pad_token_tensor", None)
        self._ids = torch.cat([prompt, prompt.new_zeros(self.batch, 64)], 1)
        self._lengths = [prompt.shape[1]] * self.batch
        for processor in processors:
            if self.batch > 1 and type(processor).__name__ in _PER_BATCH:
                raise NotImplementedError(
                    f"adaptive: {type(processor).__name__} needs rows of equal length; use a "
                    "batch of one row"
                )

    def all_finished(self) -> bool:
        """Whether no row goes on."""
        return not bool(self.alive.any())

    def alive_on(self, device: torch.device) -> Tensor:
        """`alive`, on another device."""
        return self.alive.to(device)

    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self._lengths)

    def room(self) -> int:
        """Tokens that the longest row alive may still get."""
        alive = self.alive.tolist()
        return self._most - max(n for n, on in zip(self._lengths, alive, strict=True) if on)

    def last(self) -> Tensor:
        """The last token of each row, ``[batch, 1]``."""
        ends = torch.tensor(self._lengths, device=self._ids.device) - 1
        return self._ids.gather(1, ends[:, None])

    def sequences(self) -> Tensor:
        """All tokens, ``[batch, tokens]``, finished rows padded."""
        longest = self.longest()
        made = self._ids[:, :longest].clone()
        for row, length in enumerate(self._lengths):
            if length < longest:
                made[row, length:] = int(self._pad)
        return made

    def choose(self, logits: Tensor, drafted: list[Tensor]) -> list[list[int]]:
        """The token of each row after the last logits, by search or sampling."""
        scores = self._scores(logits[:, -1], drafted)
        if self._sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        chosen: list[list[int]] = tokens.tolist()
        return chosen

    def draft(self, logits: Tensor, drafted: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Draft a token per row.

        Args:
            logits: ``[batch, 1, vocabulary]``.
            drafted: Drafts before this one, ``[batch, 1]`` each.

        Returns:
            Tokens, ``[batch, 1]``; their probabilities, ``[batch]``; and those of all tokens,
            ``[batch, vocabulary]``, or nothing for greedy search.
        """
        scores = self._scores(logits[:, -1], drafted)
        chances = scores.softmax(-1)
        drawn = torch.multinomial(chances, 1) if self._sample else None
        token = scores.argmax(-1, keepdim=True) if drawn is None else drawn
        confidence = chances.gather(1, token)[:, 0]
        return token, confidence, chances if self._sample else chances[:, :0]

    def verify(
        self, logits: Tensor, drafted: Tensor, chances: list[Tensor]
    ) -> tuple[Tensor, list[list[int]]]:
        """Compare drafts with what the model makes of them.

        Args:
            logits: After the last token and each draft, ``[batch, 1 + drafts, vocabulary]``.
            drafted: ``[batch, drafts]``.
            chances: The distribution each draft was drawn from, ``[batch, vocabulary]``.

        Returns:
            How many drafts each row accepts, ``[batch]``, and the tokens that it gets: those, and
            the model's own after them.
        """
        before = [drafted[:, i : i + 1] for i in range(drafted.shape[1])]
        scores = torch.stack(
            [self._scores(logits[:, i], before[:i]) for i in range(logits.shape[1])], 1
        )
        if self._sample:
            target = scores.softmax(-1)
            return accept_sampled(drafted, torch.stack(chances, 1), target)
        return accept_greedy(drafted, scores.argmax(-1))

    def keep(self, chosen: list[list[int]]) -> int:
        """Append tokens to the rows alive, until each ends; return how many were kept."""
        kept = 0
        for row, tokens in enumerate(chosen):
            for token in tokens:
                if not self.alive[row]:
                    break
                self._append(row, token)
                kept += 1
                ids = self._ids[row : row + 1, : self._lengths[row]]
                done = self._criteria(ids, None)
                if bool(torch.as_tensor(done).any()):
                    self.alive[row] = False
        return kept

    def end(self) -> None:
        """Tell the streamer that nothing follows."""
        if self._streamer is not None:
            self._streamer.end()

    def _append(self, row: int, token: int) -> None:
        at = self._lengths[row]
        if at == self._ids.shape[1]:
            more = self._ids.new_zeros(self.batch, self._ids.shape[1])
            self._ids = torch.cat([self._ids, more], 1)
        self._ids[row, at] = token
        self._lengths[row] = at + 1
        if self._streamer is not None:
            self._streamer.put(self._ids[row, at : at + 1].cpu())

    def _scores(self, logits: Tensor, drafted: list[Tensor]) -> Tensor:
        """Logits ``[batch, vocabulary]`` after the processors, in float32."""
        scores = logits.to(torch.float32, copy=True)
        if not len(self._processors):
            return scores
        extra = torch.cat(drafted, 1) if drafted else self._ids[:, :0]
        if len(set(self._lengths)) == 1:
            ids = torch.cat([self._ids[:, : self._lengths[0]], extra], 1)
            processed: Tensor = self._processors(ids, scores)
            return processed
        return torch.cat(
            [
                self._processors(
                    torch.cat([self._ids[row : row + 1, :length], extra[row : row + 1]], 1),
                    scores[row : row + 1],
                )
                for row, length in enumerate(self._lengths)
            ]
        )
