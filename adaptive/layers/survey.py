"""What a backend finds on a model before a patch changes anything."""

from dataclasses import dataclass
from typing import Any

from adaptive.policy import ModelShape, Policy


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention module that a patch would touch.

    Attributes:
        name: Dotted name below the patched model; may be empty for the model itself.
        kind: "hf", ENCODER, "mha" or "sdpa": how its backend takes hold of it.
        layer: Row of the plan, counted from 0 in execution order.
        heads: Query heads.
        kv_heads: Key and value heads; divides ``heads``.
        head_dim: Width of one head.
    """

    name: str
    kind: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a backend found on a model.

    Attributes:
        family: Name of the model family, or of the kind of model for plain PyTorch.
        sites: In execution order.
        shape: What a plan must know about the model.
        known: Whether a family (or the plain PyTorch backend) knows this model at all.
        have: What is supported, in lines for people to read.
        problems: Why patch() would refuse, each by name; empty if it would not.
        advice: What the user can do about the problems.
        base: Name of the module whose forward is the whole pass, for the time share.
        extra: What the backend wants to hand from survey to install.
        layers: Names of the modules that hold a layer each, in execution order.
        mlps: Names of the layers' feed-forward modules; fewer if some layers have none.
        exact_only: Why policies that are not exact do not fit the family; "": they do.
        fits: Policies that do nevertheless.
        norms: Names of the norms that the layers' first modules read through; "" for none.
        width: Of an encoder's states.
        protect: Tokens at the start of its sequences that heads read by their places.
        class_token: Whether the first of them stands for all of the sequence.
    """

    family: str
    shape: ModelShape
    known: bool = True
    sites: tuple[Site, ...] = ()
    have: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    base: str = ""
    extra: Any = None
    layers: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()
    exact_only: str = ""
    fits: tuple[type[Policy], ...] = ()
    norms: tuple[str, ...] = ()
    width: int = 0
    protect: int = 0
    class_token: bool = False
