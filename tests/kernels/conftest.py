"""What the tests of the kernels share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vision.kernels.dispatch import ENVIRONMENT_VARIABLE, read_environment
from vision.kernels.triton_support import is_interpreted


def _bi_wkv_inputs(
    tokens: int,
    decay: float | str,
    keys: str = "normal",
    bonus: float | str = 0.0,
    batch: int = 2,
    channels: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs of bi_wkv and a gradient; "5 /T" and "3 T" follow the number of tokens."""
    rng = torch.Generator().manual_seed(tokens * 1000 + channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def constant(x: float | str) -> Tensor:
        if isinstance(x, str):
            number, unit = x.split()
            x = float(number) * {"T": tokens, "/T": 1 / tokens}[unit]
        return torch.full((channels,), x, dtype=torch.float64)

    k = normal(batch, tokens, channels)
    if keys == "wide":
        k = torch.rand(k.shape, generator=rng, dtype=torch.float64) * 60 - 30
    elif keys == "spike":
        k[0, tokens // 3] = 80
    w = normal(channels) * 40 if decay == "mixed" else constant(decay)
    inputs = {
        "w": w,
        "u": constant(bonus) + 0.1 * normal(channels),
        "k": k,
        "v": normal(batch, tokens, channels),
    }
    grad = normal(batch, tokens, channels)
    return {n: x.to(device, dtype) for n, x in inputs.items()}, grad.to(device, dtype)


@pytest.fixture(scope="session")
def bi_wkv_inputs() -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """The function that makes inputs of bi_wkv and a gradient."""
    return _bi_wkv_inputs


@pytest.fixture
def backends_named() -> Iterator[Callable[[str | None], None]]:
    """A function that sets the environment variable for backends, or takes it away."""
    with pytest.MonkeyPatch.context() as patch:

        def name(text: str | None) -> None:
            if text is None:
                patch.delenv(ENVIRONMENT_VARIABLE, raising=False)
            else:
                patch.setenv(ENVIRONMENT_VARIABLE, text)
            read_environment()

        yield name
    read_environment()


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    """Change two things in Triton's interpreter, if it is on."""
    if not is_interpreted():
        yield
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    cast, call = InterpreterBuilder.cast_impl, InterpretedFunction.__call__

    def rounding(self, src, dst_type):
        """Round to bfloat16 as GPUs do; the interpreter cuts the digits off (up to 3.9)."""
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits, dst_type.scalar)

    def quick(self, *args, **kwargs):
        """Call from kernel to kernel without preparing the language anew, half of the time."""
        if not self.fn.__module__.endswith(("triton_jit", "triton_states")):
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounding)
        patch.setattr(InterpretedFunction, "__call__", quick)
        yield
