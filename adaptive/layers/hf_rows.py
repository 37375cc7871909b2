"""The rows of one `generate` call: their tokens, how the next one is chosen, and when they end."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptive.layers.speculative_sampling import accept_greedy, accept_sampled, accept_tree
from adaptive.layers.token_tree import Tree, tree_tensors

SCORES_ALONE = {
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "MinPLogitsWarper",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
}
"""Processors that look at nothing but a row's scores."""

_ROWS_ALONE = {
    "EosTokenCriteria",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "StopStringCriteria",
}
"""Criteria that say the same of a row whatever the others are."""


class Rows:
    """Tokens of each row, which may have different lengths.

    Attributes:
        refilled: Whether rows come and go, by who also closes gaps between tokens in the cache.
        prompt: ``[batch, tokens]``.
        batch: Rows.
        alive: Which rows are not finished, ``[batch]``, on the CPU.
    """

    refilled: ClassVar[bool] = False

    def __init__(
        self, prompt: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any
    ) -> None:
        """Start with the prompt; the rest is as `generate` prepared it."""
        self.prompt = prompt
        self.batch = len(prompt)
        self.alive = torch.ones(self.batch, dtype=torch.bool)
        self._processors = processors
        self._criteria = criteria
        self._streamer = streamer
        self._sample = bool(config.do_sample)
        self._most = int(criteria.max_length or config.max_length)
        self._pad: Any = getattr(config, "_pad_token_tensor", None)
        self._ids = torch.cat([prompt, self._room(prompt)], 1)
        self._lengths = [prompt.shape[1]] * self.batch

    def all_finished(self) -> bool:
        """Whether no row goes on."""
        return not bool(self.alive.any())

    @property
    def device(self) -> torch.device:
        """Where tokens are."""
        return self.prompt.device

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

    def tokens_at(self, places: Tensor) -> Tensor:
        """Tokens of each row at these places of it, ``[batch, places]``; any behind its end."""
        return self._ids.gather(1, places.clamp(max=self._ids.shape[1] - 1))

    def last(self) -> Tensor:
        """The last token of each row, ``[batch, 1]``."""
        ends = torch.tensor(self._lengths, device=self._ids.device) - 1
        return self._ids.gather(1, ends[:, None])

    def sequences(self) -> Tensor:
        """All tokens, ``[batch, tokens]``, finished rows padded."""
        return self._ids[:, : self.longest()].clone()

    def choose(self, logits: Tensor, drafted: list[Tensor]) -> list[list[int]]:
        """The token of each row after the last logits, by search or sampling."""
        chosen: list[list[int]] = self._next(self._scores(logits[:, -1], drafted)).tolist()
        return chosen

    @property
    def even(self) -> bool:
        """Whether processors, criteria or a streamer see the batch as one, rows equally long."""
        names = {type(processor).__name__ for processor in self._processors}
        criteria = {type(criterion).__name__ for criterion in self._criteria}
        alone = names <= SCORES_ALONE and criteria <= _ROWS_ALONE and self._streamer is None
        return self.batch > 1 and not alone

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self._sample

    @property
    def searches(self) -> bool:
        """Whether the next token is the one with the largest logit, and nothing more is asked."""
        return not self._sample and not len(self._processors)

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
        if self._sample:  # a short vocabulary may hold nothing that processors allow: then any
            scores = scores.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
        chances = scores.softmax(-1)
        drawn = torch.multinomial(chances, 1) if self._sample else None
        token = scores.argmax(-1, keepdim=True) if drawn is None else drawn
        confidence = chances.gather(1, token)[:, 0]
        return token, confidence, chances if self._sample else chances[:, :0]

    def rank(self, logits: Tensor, drafted: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens of each row, drawn or not, best first.

        Args:
            logits: ``[batch, 1, vocabulary]``.
            drafted: Drafts before this one, ``[batch, 1]`` each.
            width: How many; fewer if the vocabulary has not so many.

        Returns:
            Tokens and their probabilities, ``[batch, width]``.
        """
        scores = self._scores(logits[:, -1], drafted)
        top, tokens = scores.topk(min(width, scores.shape[-1]), -1)
        return tokens, (top - scores.logsumexp(-1, keepdim=True)).exp()

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

    def walk(
        self, logits: Tensor, trees: list[Tree], most: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Follow each row's tree as far as it has what the model makes.

        The next token is searched or drawn from the model's own distribution at each node, without
        regard to the tree; so what comes out is what plain decoding makes, drawn or searched.

        Args:
            logits: Of the token before the tree and of its nodes, ``[batch, 1 + nodes, vocab]``.
            trees: Of each row.
            most: The most nodes to follow.

        Returns:
            The nodes of each row's path, and the tokens that it gets: those, and one more.
        """
        if self.searches and most >= logits.shape[1] - 1:
            drafted, parents, lengths = tree_tensors(trees, logits.shape[1] - 1)
            return accept_tree(drafted, logits.argmax(-1).cpu(), parents, lengths)
        nodes: list[int | None] = [-1] * self.batch
        paths: list[list[int]] = [[] for _ in trees]
        chosen: list[list[int]] = [[] for _ in trees]
        made: list[Tensor] = []
        while any(node is not None for node in nodes):
            at = torch.tensor([0 if node is None else node + 1 for node in nodes])
            here = logits[torch.arange(self.batch), at.to(logits.device)]
            made.append(self._next(self._scores(here, made)))
            for row, token in enumerate(made[-1][:, 0].tolist()):
                node = nodes[row]
                if node is not None:
                    chosen[row].append(token)
                    found = trees[row].child(node, token) if len(paths[row]) < most else None
                    paths[row] += [] if found is None else [found]
                    nodes[row] = found
        return paths, chosen

    def _next(self, scores: Tensor) -> Tensor:
        """The next token of each row, ``[batch, 1]``, by search or a draw."""
        if self._sample:
            return torch.multinomial(scores.softmax(-1), 1)
        return scores.argmax(-1, keepdim=True)

    def keep(self, chosen: list[list[int]]) -> int:
        """Append tokens to the rows alive, until each ends; return how many were kept."""
        kept = 0
        alive = [row for row, on in enumerate(self.alive.tolist()) if on]
        ends = {self._lengths[row] for row in alive}
        if self.batch > 1 and len(ends) == 1 and len({len(chosen[row]) for row in alive}) == 1:
            return self._keep_together(chosen, ends.pop(), len(chosen[alive[0]]))
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

    def _keep_together(self, chosen: list[list[int]], length: int, tokens: int) -> int:
        """`keep` for rows alive that are ``length`` long and get ``tokens`` tokens."""
        kept = 0
        for place in range(tokens):
            if self.all_finished():
                break
            if length == self._ids.shape[1]:
                self._ids = torch.cat([self._ids, self._room(self._ids)], 1)
            alive = self.alive.tolist()
            column = [row[place] for row, on in zip(chosen, alive, strict=True) if on]
            # A finished row stays: it may be longer, if it went ahead.
            self._ids[self.alive_on(self._ids.device), length] = self._ids.new_tensor(column)
            length += 1
            kept += sum(alive)
            self._lengths = [
                length if on else n for n, on in zip(self._lengths, alive, strict=True)
            ]
            done = torch.as_tensor(self._criteria(self._ids[:, :length], None))
            self.alive &= ~done.cpu().expand(self.batch)
            if self._streamer is not None:
                self._streamer.put(self._ids[:, length - 1].cpu())
        return kept

    def end(self) -> None:
        """Tell the streamer that nothing follows."""
        if self._streamer is not None:
            self._streamer.end()

    def _room(self, ids: Tensor) -> Tensor:
        """Padding for as many tokens as ``ids``: what stands behind the end of a finished row."""
        return torch.full_like(ids, 0 if self._pad is None else int(self._pad))

    def _append(self, row: int, token: int) -> None:
        at = self._lengths[row]
        if at == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, self._room(self._ids)], 1)
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
        ids = torch.cat([self._ids[:, : self.longest()], extra], 1)
        processed: Tensor = self._processors(ids, scores)
        return processed
