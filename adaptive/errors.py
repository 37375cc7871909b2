"""The errors a user of `adaptive` may want to catch, apart from plain argument errors.

Each is also one of Python's own errors, so code that knows nothing of this package can still sort
them: an unsupported model is a NotImplementedError, a plan of another model is a ValueError.
"""


class AdaptiveError(Exception):
    """Anything this package refuses that is not a plain argument error."""


class UnsupportedModel(AdaptiveError, NotImplementedError):  # noqa: N818
    """The model, or how it is set up, cannot be patched; the message says why."""


class UnknownFamily(UnsupportedModel, LookupError):  # noqa: N818
    """No family is registered for the model's ``config.model_type``."""


class PatchConflict(AdaptiveError, RuntimeError):  # noqa: N818
    """The model is patched already, or someone changed what patch() installed."""


class PlanMismatch(AdaptiveError, ValueError):  # noqa: N818
    """A plan was made for another model, or its file is not a plan."""
