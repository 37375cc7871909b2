"""prefix_ffn: an FFN in which each row uses as many of the first neurons as its width says.

Made of products with slices of the weights, which are at the floor of what the processor gives:
there is no kernel of its own to gain from. Rows are brought in the order of their widths, so the
rows that use a neuron are the first ones, and all that is copied is rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops.skinny_linear import MAX_ROWS

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Biases = tuple[Tensor | None, Tensor | None, Tensor | None]


def reference(
    input: Tensor,
    widths: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
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
    activation: Callable[[Tensor], Tensor],
    biases: Biases = (None, None, None),
    linear: Linear = functional.linear,
) -> Tensor:
    """Compute ``down(activation(gate(x)) * up(x))`` of each row's first neurons alone.

    What adaptive computation modules, MatFormer's prefixes and Duo-LLM's big and small FFNs have in
    common (Wojcik et al. 2023, arXiv:2312.10193; Kudugunta et al. 2023, arXiv:2310.07707; Alizadeh
    et al. 2024, arXiv:2410.10846). Neurons between two neighbouring widths are computed once, for
    the rows that use them. For more than 16 rows the rows of each width are then multiplied with
    their part of ``down``. For fewer, one product reads ``down`` up to the largest width once, for
    all of them: the neurons that a row does not use are zeros in it.

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
    steps = _steps(widths, len(up))
    if not steps:
        return input.new_zeros(len(input), len(down))
    active = steps[0][1]
    whole = len(steps) == 1 and active == len(input)  # nothing to sort
    order = None if whole else widths.argsort(descending=True, stable=True)[:active]
    rows = input if order is None else input.index_select(0, order)
    pieces, begin = [], 0
    for width, users in steps:
        part, x = slice(begin, width), rows[:users]
        made = linear(x, up[part], _part(biases[1], part))
        if gate is None:
            pieces.append(activation(made))
        else:
            pieces.append(activation(linear(x, gate[part], _part(biases[0], part))) * made)
        begin = width
    out = _multiply_down(pieces, steps, down, biases[2], linear)
    if order is None:
        return out
    return out.new_zeros(len(input), len(down)).index_copy(0, order, out)


def _steps(widths: Tensor, neurons: int) -> list[tuple[int, int]]:
    """Widths above 0 that occur, ascending, and how many rows use neurons up to each."""
    if len(widths) == 1:  # decoding
        levels, counts = [int(widths[0])], [1]
    else:
        found, many = widths.unique(return_counts=True)
        levels, counts = found.tolist(), many.tolist()
    if levels and not 0 <= levels[0] <= levels[-1] <= neurons:
        wrong = levels[0] if levels[0] < 0 else levels[-1]
        raise _refused("widths", f"be in 0..{neurons}", wrong)
    return [(level, sum(counts[i:])) for i, level in enumerate(levels) if level]


def _multiply_down(
    pieces: Sequence[Tensor],
    steps: Sequence[tuple[int, int]],
    down: Tensor,
    bias: Tensor | None,
    linear: Linear,
) -> Tensor:
    """The last product, rows from the widest to the narrowest.

    Args:
        pieces: Of each step its neurons, ``[users, neurons of the step]``.
        steps: As `_steps` returns them.
        down: As for `prefix_ffn`.
        bias: Of ``down``.
        linear: As for `prefix_ffn`.
    """
    active, widest = steps[0][1], steps[-1][0]
    if len(steps) == 1 or active <= MAX_ROWS:
        if len(pieces) == 1:
            hidden = pieces[0]
        else:
            hidden = torch.cat([functional.pad(p, (0, 0, 0, active - len(p))) for p in pieces], 1)
        return linear(hidden, down[:, :widest], bias)
    groups, first = [], 0
    for last in range(len(steps) - 1, -1, -1):
        width, end = steps[last]
        hidden = torch.cat([piece[first:end] for piece in pieces[: last + 1]], 1)
        groups.append(linear(hidden, down[:, :width], bias))
        first = end
    return torch.cat(groups)


def _part(bias: Tensor | None, part: slice) -> Tensor | None:
    return None if bias is None else bias[part]


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
