"""Adapters: where each model family keeps its parts. Data, read by `adaptive.patch`."""

from adaptive.adapters import decoders as decoders
from adaptive.adapters import encoders as encoders
from adaptive.adapters._encoder_family import EncoderFamily
from adaptive.adapters._family import FAMILIES, Family, family_for, register_family

__all__ = ["FAMILIES", "EncoderFamily", "Family", "family_for", "register_family"]
