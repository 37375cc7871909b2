"""Memory around outputs that a wrong kernel may write and a right one must not, and the call."""

import ctypes

import torch

GUARD = 128  # elements around each output; a whole number of vectors


class Guarded:
    """Memory for an output, full of `value`, with more of it around."""

    def __init__(self, shape, dtype, value):
        count = torch.Size(shape).numel()
        self.all = torch.full((count + 2 * GUARD,), value, dtype=dtype)
        self.before = self.all.clone()
        self.inside = self.all[GUARD : GUARD + count].view(shape)

    def check(self):
        for around in (slice(None, GUARD), slice(len(self.all) - GUARD, None)):
            same = torch.equal(self.all[around], self.before[around])
            assert same or self.all[around].isnan().all()


def call(library, name, args, *outputs):
    """Runs the op of that name; what it throws becomes a RuntimeError."""
    message = ctypes.create_string_buffer(1000)
    if getattr(library, name)(ctypes.byref(args), message):
        raise RuntimeError(message.value.decode())
    for output in outputs:
        output.check()


def prepare(library, size, args):
    """Makes sure that both sides mean the same struct, and that every run is alike."""
    bytes_of = getattr(library, size)
    bytes_of.restype = ctypes.c_int64
    assert bytes_of() == ctypes.sizeof(args)
    library.set_seed(0)
