"""prefix_ffn: an FFN in which each row uses as many of the first neurons as its width says.

Made of products with slices of the weights, which for many rows are at the floor of what the
processor gives: they are brought in the order of their widths, so the rows that use a neuron are
the first ones, and all that is copied is rows. Few rows have a kernel, `prefix_row_ffn`, for some
functions, without biases and without gradients; here is what runs for the others.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops.skinny_linear import MAX_ROWS

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Activation = Callable[[Tensor], Tensor]
Biases = tuple[Tensor | None, Tensor | None, Tensor | None]
Weights = tuple[Tensor | None, Tensor, Tensor]


def reference(
    input: Tensor,
    widths: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    biases: Biases = (None, None, None),
) -> Tensor:
    """Compute what `prefix_ffn` does in full, and leave out what a row does not use by a mask."""
    hidden = functional.linear(input, up, biases[1])
    if gate is None:
        hidden = activation(hidden)
    else:
        hidden = activation(functional.linear(input, gate, biases[0])) * hidden
    used = torch.arange(len(up), device=input.device) < widths[:, None]
    out = functional.linear(hidden.masked_fill(~used, 0), down, biases[2])
    return out.masked_fill((widths == 0)[:, None], 0)


def prefix_ffn(
    input: Tensor,
    widths: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    biases: Biases = (None, None, None),
    linear: Linear = functional.linear,
) -> Tensor:
    """Compute ``down(activation(gate(x)) * up(x))`` of each row's first neurons alone.

    What adaptive computation modules, MatFormer's prefixes and Duo-LLM's big and small FFNs have in
    common (Wojcik et al. 2023, arXiv:2312.10193; Kudugunta et al. 2023, arXiv:2310.07707; Alizadeh
    et al. 2024, arXiv:2410.10846). Of more than 16 rows, neurons between two neighbouring widths
    are computed once, for the rows that use them, and the rows of each width are multiplied with
    their part of ``down``. Fewer rows take as long as reading the weights: three products up to the
    largest width, in which the neurons that a row does not use become zeros.

    Args:
        input: ``[rows, in_features]``, any floating dtype.
        widths: Neurons of each row, ``[rows]``, whole numbers in 0..neurons. 0: the row is skipped;
            what it gets is zeros, without the bias of ``down``.
        gate: ``[neurons, in_features]``; None: a plain FFN, ``down(activation(up(x)))``.
        up: ``[neurons, in_features]``.
        down: ``[out_features, neurons]``.
        activation: Applied elementwise.
        biases: Of ``gate``, ``up`` and ``down``; None: none is added.
        linear: What multiplies, as `torch.nn.functional.linear`.

    Returns:
        ``[rows, out_features]``. Differentiable in all but ``widths``, if ``linear`` is. Where a
        row does not use a neuron, that neuron's weights do not count, if they are finite.

    Raises:
        ValueError: A shape is wrong, or a width is out of range.
        TypeError: ``widths`` does not hold whole numbers.
    """
    _check(input, widths, gate, up, down)
    form = _of_few if len(input) <= MAX_ROWS else _of_many
    weights = gate, up, down
    return form(input, widths, weights, activation, biases, linear)


def _of_few(
    input: Tensor,
    widths: Tensor,
    weights: Weights,
    activation: Activation,
    biases: Biases,
    linear: Linear,
) -> Tensor:
    """Products up to the largest width; arguments as for `prefix_ffn`."""
    neurons = widths.tolist()
    _check_range(min(neurons, default=0), max(neurons, default=0), len(weights[1]))
    out = input.new_zeros(len(input), len(weights[2]))
    used = [row for row, width in enumerate(neurons) if width]
    if not used:
        return out
    every = len(used) == len(input)
    order = None if every else torch.tensor(used, device=input.device)
    rows, own = (t if order is None else t.index_select(0, order) for t in (input, widths))
    part = slice(0, max(neurons))
    hidden = _first(rows, part, weights, activation, biases, linear)
    if len({neurons[row] for row in used}) > 1:
        places = torch.arange(hidden.shape[1], device=hidden.device)
        hidden = hidden.masked_fill(places >= own[:, None], 0)
    made = linear(hidden, weights[2][:, part], biases[2])
    return made if order is None else out.to(made.dtype).index_copy(0, order, made)


def _of_many(
    input: Tensor,
    widths: Tensor,
    weights: Weights,
    activation: Activation,
    biases: Biases,
    linear: Linear,
) -> Tensor:
    """Each product for the rows that use it; arguments as for `prefix_ffn`."""
    found, counts = (t.tolist() for t in widths.unique(return_counts=True))
    _check_range(found[0], found[-1], len(weights[1]))
    # widths above 0 that occur, ascending, and how many rows use neurons up to each
    steps = [(width, sum(counts[i:])) for i, width in enumerate(found) if width]
    out = input.new_zeros(len(input), len(weights[2]))
    if not steps:
        return out
    whole = len(steps) == 1 and steps[0][1] == len(input)  # nothing to sort
    order = None if whole else widths.argsort(descending=True, stable=True)[: steps[0][1]]
    rows = input if order is None else input.index_select(0, order)
    begins = [0, *(width for width, _ in steps)]
    pieces = [
        _first(rows[:users], slice(begin, width), weights, activation, biases, linear)
        for begin, (width, users) in zip(begins, steps, strict=False)
    ]
    groups, first = [], 0
    for last in range(len(steps) - 1, -1, -1):  # from the widest on
        width, end = steps[last]
        own = [piece[first:end] for piece in pieces[: last + 1]]
        hidden = own[0] if len(own) == 1 else torch.cat(own, 1)
        groups.append(linear(hidden, weights[2][:, :width], biases[2]))
        first = end
    made = groups[0] if len(groups) == 1 else torch.cat(groups)
    return made if order is None else out.to(made.dtype).index_copy(0, order, made)


def _first(
    x: Tensor,
    part: slice,
    weights: Weights,
    activation: Activation,
    biases: Biases,
    linear: Linear,
) -> Tensor:
    """Neurons of a part of the FFN, ``[rows, neurons of the part]``."""
    gate, up, _ = weights
    made = linear(x, up[part], _part(biases[1], part))
    if gate is None:
        return activation(made)
    return activation(linear(x, gate[part], _part(biases[0], part))) * made


def _part(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]


def _check_range(least: int, most: int, neurons: int) -> None:
    if not 0 <= least <= most <= neurons:
        raise _refused("widths", f"be in 0..{neurons}", least if least < 0 else most)


def _check(input: Tensor, widths: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> None:
    matrices = {"input": input, "up": up, "down": down}
    for name, tensor in (matrices if gate is None else {**matrices, "gate": gate}).items():
        if tensor.dim() != 2:  # noqa: PLR2004
            raise _refused(name, "have 2 dimensions", f"shape {list(tensor.shape)}")
    wanted = [("up", up, [len(up), input.shape[1]]), ("down", down, [len(down), len(up)])]
    wanted += [] if gate is None else [("gate", gate, [len(up), input.shape[1]])]
    for name, tensor, shape in [*wanted, ("widths", widths, [len(input)])]:
        if list(tensor.shape) != shape:
            raise _refused(name, f"have shape {shape}", list(tensor.shape))
    if widths.is_floating_point() or widths.dtype == torch.bool:
        raise TypeError(f"adaptive::prefix_ffn: widths must hold whole numbers, got {widths.dtype}")


def _refused(name: str, rule: str, value: object) -> ValueError:
    return ValueError(f"adaptive::prefix_ffn: {name} must {rule}, got {value}")
