"""Who chooses the tokens of a recursion: nobody, each recursion, or each token at the beginning."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.ops.combine_tokens import combine_tokens
from adaptive.ops.gather_tokens import gather_tokens
from adaptive.ops.route_tokens import route_tokens
from adaptive.ops.router_scores import router_scores
from adaptive.zoo.config import RecursiveTransformerConfig


@dataclass
class Routing:
    """What the router said, and how often each token ran the block.

    Attributes:
        depths: ``[batch, tokens]``, int64.
        logits: Of the candidates of each recursion, ``[batch, candidates]``, or of all depths,
            ``[batch, tokens, recursions]``.
        taken: Which candidates were taken; None: all, and the threshold is not asked.
        there: Which candidates are tokens; None: all.
    """

    depths: Tensor
    logits: list[Tensor] = field(default_factory=list)
    taken: list[Tensor | None] = field(default_factory=list)
    there: list[Tensor | None] = field(default_factory=list)

    def losses(self, router: str | None) -> tuple[Tensor, Tensor]:
        """The auxiliary loss and the z-loss (Zoph et al. 2022, arXiv:2202.08906), unweighted.

        Expert choice: binary cross-entropy of the sigmoid with what the capacity took, which makes
        the threshold choose as the capacity did (Raposo et al. 2024, arXiv:2404.02258). Token
        choice: shares of the depths times their mean probabilities (Fedus et al. 2021,
        arXiv:2101.03961), 1 where both are even.
        """
        nothing = torch.zeros((), device=self.depths.device)
        if router is None:
            return nothing, nothing
        if router == "token":
            logits = self.logits[0]
            count = logits.shape[-1]
            share = F.one_hot(self.depths - 1, count).float().mean((0, 1))
            balance = count * (share * logits.softmax(-1).mean((0, 1))).sum()
            return balance, logits.logsumexp(-1).square().mean()
        here = [
            torch.ones_like(logits, dtype=torch.bool) if there is None else there
            for logits, there in zip(self.logits, self.there, strict=True)
        ]
        told = [
            F.binary_cross_entropy_with_logits(logits[there], taken[there].float())
            for logits, taken, there in zip(self.logits, self.taken, here, strict=True)
            if taken is not None
        ]
        squares = [
            logits[there].square().mean() for logits, there in zip(self.logits, here, strict=True)
        ]
        return (torch.stack(told).mean() if told else nothing), torch.stack(squares).mean()


class Choice:
    """No router: all tokens run all recursions."""

    def __init__(
        self, config: RecursiveTransformerConfig, router: nn.Linear | None, select: str, x: Tensor
    ) -> None:
        """Know what is chosen from: ``x``, ``[batch, tokens, width]``, before the first turn."""
        self.config, self.select, self.start = config, select, x
        self.weight = None if router is None else router.weight

    def choose(self, turn: int, x: Tensor, tokens: Tensor | None, routing: Routing) -> Chosen:
        """Choose the tokens of a turn among those of the one before; None: all."""
        return Chosen(tokens)

    def merge(self, turn: int, x: Tensor, done: Tensor, chosen: Chosen) -> Tensor:
        """Bring what the block computed back to the sequences."""
        return done if chosen.tokens is None else replace_tokens(x, done, chosen.tokens)


@dataclass
class Chosen:
    """Tokens that run a turn.

    Attributes:
        tokens: Their positions, ``[batch, chosen]``, int32, ascending, then -1; None: all.
        places: Their places among the candidates; None: all candidates stay.
        weights: The router's, ``[batch, chosen]``, float32.
        inside: Their hidden states, where these are gathered already.
    """

    tokens: Tensor | None
    places: Tensor | None = None
    weights: Tensor | None = None
    inside: Tensor | None = None


class ExpertChoice(Choice):
    """Each turn takes the best of the candidates, or those whose score reaches the threshold."""

    def choose(self, turn: int, x: Tensor, tokens: Tensor | None, routing: Routing) -> Chosen:
        """Choose among the tokens of the turn before."""
        assert self.weight is not None
        candidates = x if tokens is None else gather_tokens(x, tokens)
        logits = router_scores(candidates, self.weight[turn : turn + 1], function="identity")
        check_logits(logits)
        there = None if tokens is None else tokens >= 0
        share, taken = self.config.shares[turn], None
        chosen = Chosen(tokens, None, logits, candidates)
        if share < 1:
            if self.select == "capacity":
                room = max(1, int(share * x.shape[1]))
                found = route_tokens(logits.detach(), capacity=room, valid=there)
            else:
                scores = logits.detach().sigmoid()
                found = route_tokens(scores, threshold=self.config.threshold, valid=there)
            taken = found[2] >= 0
            places = found[0][:, : int(found[1].max())]
            listed = places if tokens is None else take(tokens, places)
            inside = gather_tokens(candidates, places)
            chosen = Chosen(listed, places, take(logits, places), inside)
        routing.logits.append(logits)
        routing.taken.append(taken)
        routing.there.append(there)
        assert chosen.weights is not None
        chosen.weights = self.config.factor * chosen.weights.sigmoid()
        return chosen

    def merge(self, turn: int, x: Tensor, done: Tensor, chosen: Chosen) -> Tensor:
        """Add with the router's weight: what came out takes what came in along."""
        if not self.config.weighted:
            return super().merge(turn, x, done, chosen)
        if chosen.tokens is not None:
            return combine_tokens(x, done, chosen.tokens, chosen.weights)
        assert chosen.weights is not None
        return (x.float() + chosen.weights[..., None] * done.float()).to(x.dtype)


class TokenChoice(Choice):
    """Each token chooses at the beginning how many turns it takes, from 1 to all."""

    def __init__(
        self, config: RecursiveTransformerConfig, router: nn.Linear | None, select: str, x: Tensor
    ) -> None:
        """Ask the router."""
        super().__init__(config, router, select, x)
        assert self.weight is not None
        self.logits = F.linear(x, self.weight).float()
        self.depths, self.gates = depth_of(self.logits, config)

    def choose(self, turn: int, x: Tensor, tokens: Tensor | None, routing: Routing) -> Chosen:
        """Choose those that are not there yet."""
        if turn == 0:
            routing.logits.append(self.logits)
            return Chosen(tokens)
        there = None
        if tokens is not None:  # candidates as a mask; what is no token stands nowhere
            there = torch.zeros_like(self.depths, dtype=torch.bool)
            rows, place = (tokens >= 0).nonzero(as_tuple=True)
            there[rows, tokens[rows, place].long()] = True
        found = route_tokens(self.depths.float(), threshold=float(turn + 1), valid=there)
        listed = found[0][:, : int(found[1].max())]
        if tokens is None:
            return Chosen(listed, listed)
        # Positions are unique and ascending, and the new ones are among the old ones.
        last = torch.iinfo(torch.int32).max
        old = tokens.masked_fill(tokens < 0, last).contiguous()
        places = torch.searchsorted(old, listed.contiguous()).int().masked_fill(listed < 0, -1)
        return Chosen(listed, places)

    def merge(self, turn: int, x: Tensor, done: Tensor, chosen: Chosen) -> Tensor:
        """Weigh a token's last result and add where it began."""
        if self.config.weighted:
            depths, gates, start = self.depths, self.gates, self.start
            if chosen.tokens is not None:
                depths, gates = take(depths, chosen.tokens), take(gates, chosen.tokens)
                start = gather_tokens(start, chosen.tokens)
            ended = (start.float() + gates[..., None] * done.float()).to(x.dtype)
            done = torch.where((depths == turn + 1)[..., None], ended, done)
        return super().merge(turn, x, done, chosen)


CHOICES = {None: Choice, "expert": ExpertChoice, "token": TokenChoice}


def depth_of(logits: Tensor, config: RecursiveTransformerConfig) -> tuple[Tensor, Tensor]:
    """Depths, from 1 on, and weights, float32, of logits ``[..., recursions]``; first of equals."""
    check_logits(logits)
    shares = logits.softmax(-1)
    best = logits.detach().argmax(-1)
    gates = shares.gather(-1, best[..., None])[..., 0]
    return best + 1, config.factor * gates


def check_logits(logits: Tensor) -> None:
    """Raise ValueError for NaN."""
    if bool(logits.detach().isnan().any()):
        raise ValueError("adaptive::zoo: the router's scores must be numbers, got NaN")


def take(values: Tensor, places: Tensor) -> Tensor:
    """Entries of ``[batch, tokens]`` at ``[batch, chosen]``; at -1 -1, and 0 of floats."""
    found = values.gather(1, places.long().clamp(min=0))
    return found.masked_fill(places < 0, 0 if values.is_floating_point() else -1)


def replace_tokens(x: Tensor, update: Tensor, tokens: Tensor) -> Tensor:
    """Put the rows of ``update`` where ``tokens`` says; differentiable in both."""
    rows, place = (tokens >= 0).nonzero(as_tuple=True)
    return x.index_put((rows, tokens[rows, place].long()), update[rows, place].to(x.dtype))
