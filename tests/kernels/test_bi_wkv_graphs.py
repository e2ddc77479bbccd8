"""bi_wkv inside torch.compile, torch.export and ONNX."""

from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vision.kernels import bi_wkv, use_backend
from vision.kernels.bi_wkv import OPERATOR, _backward_op, _forward_op

NODE = torch.ops.vision.bi_wkv.default


def make(batch: int = 2, tokens: int = 9, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(tokens)
    shapes = ((6,), (6,), (batch, tokens, 6), (batch, tokens, 6))
    return [torch.randn(s, generator=rng).div(s[0] if len(s) == 1 else 1).to(dtype) for s in shapes]


class Mixer(nn.Module):
    """A module with parameters around the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = (nn.Parameter(x) for x in make()[:2])

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        return bi_wkv(self.w / k.shape[1], self.u / k.shape[1], k, v) + v


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    compute = torch.promote_types(dtype, torch.float32)
    reason = OPERATOR.why_not(OPERATOR.backends[backend], torch.device("cpu"), compute)
    if reason is not None:
        pytest.skip(f"backend {backend} cannot serve {dtype} on the CPU: {reason}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", list(OPERATOR.backends))
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    skip_unless_served(backend, dtype)
    inputs = make(dtype=dtype)
    for k, v in (inputs[2:], [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[2:]]):
        leaves = [x.detach().requires_grad_() for x in (*inputs[:2], k, v)]
        torch.library.opcheck(_forward_op, (*leaves, backend))
        torch.library.opcheck(_backward_op, (*inputs[:2], k, v, v, v, backend))


@pytest.mark.parametrize("backend", list(OPERATOR.backends))
def test_opcheck_of_one_token_and_swapped_strides(backend: str) -> None:
    inputs = make(2, 1)
    skip_unless_served(backend, inputs[2].dtype)
    k, v = (x.squeeze(1).t().contiguous().t().unsqueeze(1) for x in inputs[2:])
    assert not v.is_contiguous()
    torch.library.opcheck(_forward_op, (*inputs[:2], k, v, backend))
    torch.library.opcheck(_backward_op, (*inputs[:2], k, v, v, v, backend))


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile_with_full_graph(engine: str) -> None:
    function = lambda *x: bi_wkv(*x) * 2  # noqa: E731 -- compiled as any function
    compiled = torch.compile(function, fullgraph=True, backend=engine)
    for inputs in (make(), make(3, 17)):
        for actual, expected in zip(
            gradients(compiled, inputs), gradients(function, inputs), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiled_graph_holds_one_node_each_way() -> None:
    nodes = {"forward": [], "backward": []}

    def note(direction: str) -> Callable:
        def compiler(graph: torch.fx.GraphModule, example: list) -> Callable:
            nodes[direction] += [str(n.target) for n in graph.graph.nodes if "vision" in str(n)]
            nodes[direction] += [str(n.target) for n in graph.graph.nodes if "bi_wkv" in n.name]
            return graph.forward

        return compiler

    from torch._dynamo.backends.common import aot_autograd

    engine = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
    gradients(torch.compile(bi_wkv, fullgraph=True, backend=engine), make())
    assert nodes == {
        "forward": ["vision.bi_wkv.default"],
        "backward": ["vision.bi_wkv_backward.default"],
    }


def test_compiled_code_follows_use_backend_and_environment(
    monkeypatch: pytest.MonkeyPatch,
    backends_named: Callable[[str | None], None],
) -> None:
    served = []
    for name in ("cpu", "torch", "reference"):
        backend = OPERATOR.backends[name]

        def note(*x: Tensor, _name: str = name, _of: Callable = backend.forward) -> Tensor:
            served.append(_name)
            return _of(*x)

        monkeypatch.setitem(OPERATOR.backends, name, type(backend)(name, note, backend.backward))
    compiled = torch.compile(lambda *x: bi_wkv(*x), fullgraph=True, backend="eager")
    inputs = make()
    compiled(*inputs)
    backends_named("reference")
    compiled(*inputs)
    with use_backend("torch"):
        compiled(*inputs)
    assert served == ["cpu", "reference", "torch"]

    def inside(*x: Tensor) -> Tensor:
        with use_backend("torch"):
            return bi_wkv(*x)

    torch.compile(inside, fullgraph=True, backend="eager")(*inputs)
    assert served[3:] == ["torch"]


def test_export_holds_one_node_and_free_sizes() -> None:
    mixer = Mixer()
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    free = {0: batch, 1: tokens}
    program = torch.export.export(mixer, tuple(make()[2:]), dynamic_shapes=(free, free))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(NODE) == 1
    k, v = make(3, 50)[2:]
    torch.testing.assert_close(program.module()(k, v), mixer(k, v))


def test_export_in_ordinary_operators() -> None:
    with use_backend("export"):
        program = torch.export.export(Mixer(), tuple(make()[2:]))
    assert "vision" not in str(program.graph)


@pytest.mark.parametrize("by_name", [True, False], ids=["use_backend", "by itself"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_onnx_with_free_sizes(by_name: bool) -> None:
    mixer = Mixer().eval()
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with use_backend("export" if by_name else "auto"):
        program = torch.onnx.export(
            mixer, tuple(make()[2:]), dynamo=True, dynamic_shapes=(free, free), verbose=False
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [x.name for x in session.get_inputs()]
    for inputs in (make(), make(3, 50)):
        feed = dict(zip(names, (x.numpy() for x in inputs[2:]), strict=True))
        (y,) = session.run(None, feed)
        torch.testing.assert_close(
            torch.from_numpy(y), mixer(*inputs[2:]).detach(), rtol=1e-5, atol=1e-5
        )
