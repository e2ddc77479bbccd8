"""shift_mix and gate inside torch.compile, torch.export and ONNX."""

from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vision.kernels import gate, shift_mix, use_backend
from vision.kernels.dispatch import Operator
from vision.kernels.gate import OPERATOR as GATE
from vision.kernels.gate import _backward_op as gate_backward_op
from vision.kernels.gate import _forward_op as gate_op
from vision.kernels.shift_mix import OPERATOR as SHIFT_MIX
from vision.kernels.shift_mix import _backward_op as shift_mix_backward_op
from vision.kernels.shift_mix import _forward_op as shift_mix_op

EDGES = [0, 1, 3, 4, 6]


def make(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x


def served(op: Operator) -> list[tuple[str, torch.dtype]]:
    """Pair the operator's backends with the dtypes of tensors they are for."""
    return [
        (backend.name, dtype)
        for backend in op.backends.values()
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        if backend.dtypes is None or torch.promote_types(dtype, torch.float32) in backend.dtypes
    ]


def require(op: Operator, backend: str) -> None:
    """Skip where a backend does not run on the CPU of this machine."""
    reason = op.why_not(op.backends[backend], torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


class Mixer(nn.Module):
    """Both operators on the tokens of a map, with the proportions as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(make(3, 7).sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        hw = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        r, k, v = shift_mix(tokens, self.mu, hw, edges=EDGES)
        return gate(r, k * v).transpose(1, 2).unflatten(2, hw)


def gradients(module: Mixer, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, module.mu])]


@pytest.mark.parametrize(("backend", "dtype"), served(SHIFT_MIX))
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_opcheck_of_shift_mix(backend: str, dtype: torch.dtype, strided: bool) -> None:
    require(SHIFT_MIX, backend)
    x, mu = make(2, 6, 7, dtype=dtype, channels_last=strided), make(3, 7, dtype=dtype)
    grads = [make(2, 6, 7, dtype=dtype, channels_last=strided) for _ in range(3)]
    settings = (2, 3, 1, EDGES, backend)
    torch.library.opcheck(
        shift_mix_op, (x.detach().requires_grad_(), mu.detach().requires_grad_(), *settings)
    )
    torch.library.opcheck(shift_mix_backward_op, (x, mu, grads, *settings))


@pytest.mark.parametrize(("backend", "dtype"), served(GATE))
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_opcheck_of_gate(backend: str, dtype: torch.dtype, strided: bool) -> None:
    require(GATE, backend)
    r, y, grad = (make(2, 6, 7, dtype=dtype, channels_last=strided) for _ in range(3))
    torch.library.opcheck(
        gate_op, (r.detach().requires_grad_(), y.detach().requires_grad_(), backend)
    )
    torch.library.opcheck(gate_backward_op, (r, y, grad, backend))


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile_with_full_graph(engine: str) -> None:
    mixer = Mixer()
    compiled = torch.compile(mixer, fullgraph=True, backend=engine)
    # The second shape makes sizes symbolic.
    for x in (make(2, 7, 3, 4), make(3, 7, 5, 2)):
        for actual, expected in zip(
            gradients(mixer, compiled, x), gradients(mixer, mixer, x), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiled_graph_holds_one_node_each_way() -> None:
    nodes = {"forward": [], "backward": []}

    def note(direction: str) -> Callable:
        def compiler(graph: torch.fx.GraphModule, example: list) -> Callable:
            targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
            nodes[direction] += [target for target in targets if target.startswith("vision.")]
            return graph.forward

        return compiler

    from torch._dynamo.backends.common import aot_autograd

    engine = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
    mixer = Mixer()
    gradients(mixer, torch.compile(mixer, fullgraph=True, backend=engine), make(2, 7, 3, 4))
    assert nodes == {
        "forward": ["vision.shift_mix.default", "vision.gate.default"],
        "backward": ["vision.gate_backward.default", "vision.shift_mix_backward.default"],
    }


def free_sizes() -> tuple[dict[int, torch.export.Dim]]:
    names = {0: "batch", 2: "height", 3: "width"}
    return ({axis: torch.export.Dim(name) for axis, name in names.items()},)


def test_export_holds_one_node_of_each_and_free_sizes() -> None:
    mixer = Mixer()
    program = torch.export.export(mixer, (make(2, 7, 3, 4),), dynamic_shapes=free_sizes())
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [target for target in targets if target.startswith("vision.")] == [
        "vision.shift_mix.default",
        "vision.gate.default",
    ]
    x = make(3, 7, 5, 2)
    torch.testing.assert_close(program.module()(x), mixer(x))


def test_export_in_ordinary_operators() -> None:
    mixer, x = Mixer(), make(2, 7, 3, 4)
    with use_backend("export"):
        program = torch.export.export(mixer, (x,), dynamic_shapes=free_sizes())
    assert "vision" not in str(program.graph)
    x = make(3, 7, 5, 6)
    torch.testing.assert_close(program.module()(x), mixer(x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_onnx_with_free_sizes() -> None:
    mixer = Mixer().eval()
    program = torch.onnx.export(
        mixer, (make(2, 7, 3, 4),), dynamo=True, dynamic_shapes=free_sizes(), verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (name,) = [x.name for x in session.get_inputs()]
    for x in (make(2, 7, 3, 4), make(3, 7, 5, 6)):
        (y,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), mixer(x).detach(), rtol=1e-5, atol=1e-5)


def test_forward_mode_is_refused_not_ignored() -> None:
    r, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(r, torch.ones_like(r))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            gate(dual, y)
