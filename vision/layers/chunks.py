"""Functions of single tokens, applied to a part of the tokens at a time.

The hidden layer of a feed-forward is the widest tensor of a block. Without gradients nothing needs
all of it at once, and a part of it stays in the processor's cache.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vision.kernels.seam import is_eager

# The widest tensor of a part takes at most so many bytes: less costs calls, more costs memory. What
# is no CPU wants many tokens at once.
CHUNK_BYTES = {"cpu": 4 << 20, "*": 256 << 20}


def chunk_count(x: Tensor, width: int) -> int:
    """Return how many parts the tokens (..., C) are taken in, if `width` channels are held of each.

    One where gradients may be asked for, and where something traces the operators (torch.compile,
    export, tracing, counting), so that no graph holds a loop over a size.
    """
    if torch.is_grad_enabled() or not is_eager(x):
        return 1
    most = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["*"])
    tokens = x.shape[:-1].numel()
    return min(tokens, max(1, math.ceil(tokens * width * x.element_size() / most)))


def by_chunks(function: Callable[[list[Tensor]], Tensor], width: int, x: list[Tensor]) -> Tensor:
    """Apply a function that treats every token for itself, in parts where that spares memory.

    Args:
        function: takes a list of tokens (..., C_i) and returns (..., C). It may empty the list:
            what nobody else holds is then gone when the function is done with it.
        width: channels of the widest tensor that the function holds in between.
        x: tokens (..., C_i) of one shape but for the channels.

    Returns:
        What `function(x)` returns, up to rounding.
    """
    count = chunk_count(x[0], width)
    if count == 1:
        return function(x)
    shape = x[0].shape[:-1]
    size = -(-shape.numel() // count)
    parts = zip(*(one.reshape(-1, one.shape[-1]).split(size) for one in x), strict=True)
    whole: Tensor | None = None
    for i, part in enumerate(parts):
        y = function(list(part))
        if whole is None:  # its width and dtype are known by the first part alone
            whole = y.new_empty(shape.numel(), y.shape[-1])
        whole[i * size : i * size + len(y)] = y
    assert whole is not None
    return whole.view(*shape, -1)
