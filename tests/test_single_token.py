"""Linear layers of one token: found while a model runs, and in the graph that a compiler gets."""

from collections import Counter
from shutil import which
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import lookup_backend
from transformers.activations import ACT2FN

from kvzip import checks, single_token, step_compiler
from kvzip.graphs import logits_of
from kvzip.kernels import reference
from kvzip.model_types import TESTED
from kvzip.single_token import SingleTokenLinear, suits
from kvzip.step_compiler import rewrite


class Block(nn.Module):
    """Queries, keys and values as transformers' models have them, and what follows them."""

    def __init__(self, biases=(True, True, True)):
        super().__init__()
        self.first = nn.ModuleList(
            nn.Linear(16, size, bias=bias) for size, bias in zip((8, 4, 4), biases, strict=True)
        )
        self.last = nn.Linear(8, 16, bias=False)

    def forward(self, x):
        q, k, v = (layer(x) for layer in self.first)
        return self.last(q * torch.cat([k, v], dim=-1).sigmoid()) + x


class Stream(Block):
    """Results that are added to a stream, or to what only looks like one."""

    def forward(self, x):
        y = x + self.last(x[..., :8])
        z = self.last(y[..., :8]) + y
        once = self.last(z[..., :8])
        twice = once + z
        return twice * once + (self.last(twice[..., :8]) + 1) + (self.last(z[..., 8:]) + z[0, 0])


class Changed(Block):
    """A token that changes between one layer and the next."""

    def forward(self, x):
        x = x * 2
        q = self.first[0](x)
        x.add_(1)
        return q + torch.cat([self.first[1](x), self.first[2](x)], dim=-1)


class ChangedView(Block):
    """The same, through another view of it."""

    def forward(self, x):
        x = x * 2
        q = self.first[0](x)
        x.view(-1).mul_(3)
        return q + torch.cat([self.first[1](x), self.first[2](x)], dim=-1)


class ChangedBeforeSum(Block):
    """A token that changes between a layer and what is added to its result."""

    def forward(self, x):
        x = x * 2
        y = self.last(x[..., :8])
        x *= 2
        return y + x


class Gated(nn.Module):
    """An MLP as transformers' models have it, and what only looks like one."""

    def __init__(self, activation, bias=False):
        super().__init__()
        self.gate, self.up = (nn.Linear(16, 24, bias=bias) for _ in range(2))
        self.down = nn.Linear(24, 16, bias=bias)
        self.activation = activation

    def forward(self, x):
        return x + self.down(self.activation(self.gate(x)) * self.up(x))


class OneGate(Gated):
    """One gate for all; and an activation that is called with its argument's name."""

    def __init__(self):
        super().__init__(lambda x: F.silu(input=x))
        self.one = nn.Linear(16, 1, bias=False)
        self.many = nn.Linear(16, 24, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.one(x)) * self.many(x)) + self.down(
            self.activation(self.gate(x)) * self.up(x)
        )


class Twice(Gated):
    """What a gate lets through is needed twice."""

    def forward(self, x):
        gate = self.activation(self.gate(x))
        return (gate * self.up(x)).sum() + gate.sum()


@pytest.fixture
def made():
    torch.manual_seed(0)
    return Block().requires_grad_(False)


def token(rows=1):
    return torch.randn(1, rows, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls():
    """How many matrices and biases each call of `matvec` was given; activations of gates.

    Where there are scales, how many of them, too.
    """
    seen = []

    class Counting:
        def matvec(self, vector, matrices, biases, scales):
            seen.append((len(matrices), len(biases), *[len(scales)] * bool(scales)))
            return reference.matvec(vector, matrices, biases, scales)

        def gated_matvec(self, vector, gate, up, activation, scales):
            seen.append((activation, len(scales)) if scales else activation)
            return reference.gated_matvec(vector, gate, up, activation, scales)

    with mock.patch.object(single_token, "operations", return_value=Counting()):
        yield seen


def compiled(block, then=None):
    def backend(module, inputs):
        rewrite(module.graph)
        module.graph.lint()
        module.recompile()
        return lookup_backend(then)(module, inputs) if then else module.forward

    torch._dynamo.reset()
    return torch.compile(block, backend=backend, dynamic=False)


def test_a_running_model_is_served(made, calls):
    expected = made(token())
    with SingleTokenLinear():
        out = made(token())
    assert calls == [(1, 1), (1, 1), (1, 1), (1, 0)]
    torch.testing.assert_close(out, expected)
    made(token())
    assert len(calls) == 4


def test_more_than_one_token_is_left_alone(made, calls):
    with SingleTokenLinear():
        torch.testing.assert_close(made(token(3)), made(token(3)))
    compiled(made)(token(3))
    assert calls == []


def test_layers_of_one_token_are_joined(made, calls):
    out = compiled(made)(token())
    assert calls == [(3, 3), (1, 1)]
    torch.testing.assert_close(out, made(token()))


def test_layers_without_bias_are_not_joined_with_others(calls):
    block = Block((True, False, True)).requires_grad_(False)
    out = compiled(block)(token())
    assert sorted(calls) == [(1, 0), (1, 1), (2, 2)]
    torch.testing.assert_close(out, block(token()))


def test_sums_become_part_of_a_layer(calls):
    block = Stream().requires_grad_(False)
    out = compiled(block)(token())
    assert calls == [(1, 1), (1, 1), (1, 0), (1, 0), (1, 0)]
    torch.testing.assert_close(out, block(token()))


@pytest.mark.parametrize("kind", [Changed, ChangedView, ChangedBeforeSum])
def test_a_token_that_changes_is_read_when_it_was(kind, calls):
    block = kind().requires_grad_(False)
    out = compiled(block)(token())
    assert calls == []
    torch.testing.assert_close(out, block(token()))


def test_weights_that_were_just_computed_are_left_alone(calls):
    layer = nn.Linear(16, 8, bias=False).bfloat16().requires_grad_(False)
    with SingleTokenLinear():
        out = F.linear(token(), layer.weight.float())
        assert calls == []
        F.linear(token().bfloat16(), layer.weight)
    assert calls == [(1, 0)]
    torch.testing.assert_close(out, token() @ layer.weight.float().T)


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.SiLU(), "silu"), (ACT2FN["silu"], "silu"), (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh")],
)
def test_gates_become_one_call(activation, name, calls):
    block = Gated(activation).requires_grad_(False)
    out = compiled(block)(token())
    assert calls == [name, (1, 1)]
    torch.testing.assert_close(out, block(token()))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Gated(nn.SiLU(), bias=True), [(2, 2), (1, 1)]),
        (Gated(nn.GELU()), [(2, 0), (1, 1)]),
        (Gated(nn.ReLU()), [(2, 0), (1, 1)]),
        (Twice(nn.SiLU()), [(2, 0)]),
        (OneGate(), [(4, 0), (1, 0), (1, 1)]),
    ],
    ids=["bias", "exact-gelu", "relu", "needed-twice", "one-gate"],
)
def test_other_gates_are_left_alone(block, expected, calls):
    block.requires_grad_(False)
    out = compiled(block)(token())
    assert calls == expected
    torch.testing.assert_close(out, block(token()))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"matvec": 6, "gated_matvec": 1}),
        ("qwen2", {"matvec": 6, "gated_matvec": 1}),
        ("gemma2", {"matvec": 6, "gated_matvec": 1}),
        ("phi3", {"matvec": 7}),  # gate and up are one weight
        ("mixtral", {"matvec": 5}),  # routing writes in place
    ],
)
def test_steps_of_models_are_rewritten_and_compute_the_same(kind, expected, monkeypatch):
    """Layers of a kind share graphs, so that their calls count once."""
    (model_type,) = (one for one in TESTED if one.id == kind)
    subject = checks.Subject(model_type)
    model, found = subject.model.hf_model, Counter()

    def compile_nothing(module, inputs):
        rewrite(module.graph)
        module.recompile()
        targets = [str(node.target) for node in module.graph.nodes]
        found.update(name.split(".")[1] for name in targets if name.startswith("kvzip."))
        return module.forward

    monkeypatch.setattr(step_compiler, "_compile", compile_nothing)
    torch._dynamo.reset()
    ids, logits = subject.query, []
    for forward in (model, step_compiler.compile_forward(model)):
        kv = subject.full()
        positions = torch.arange(kv.seen_tokens, kv.seen_tokens + len(ids))[None]
        with torch.no_grad():
            logits_of(model, ids[None, :-1], positions[:, :-1], kv)
            logits.append(logits_of(forward, ids[None, -1:], positions[:, -1:], kv))
    torch.testing.assert_close(*logits)
    assert dict(found) == expected


def test_what_does_not_suit():
    vector, matrix = torch.zeros(1, 1, 8), torch.zeros(4, 8)
    assert suits(vector, matrix)
    assert suits(vector, nn.Parameter(matrix))
    assert not suits(torch.zeros(1, 2, 8), matrix)
    assert not suits(vector.half(), matrix)
    assert not suits(vector.double(), matrix.double())
    assert not suits(vector, torch.zeros(8, 4).T)
    assert not suits(vector, matrix.as_subclass(type("Quantized", (torch.Tensor,), {})))


def test_other_functions_are_passed_on():
    with SingleTokenLinear():
        assert F.relu(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]
        assert torch.zeros(2, dtype=torch.int64).sum() == 0


def quantized(block, kind="int8", names=None, **settings):
    """Linear layers, or those of some names, by torchao."""
    torchao = pytest.importorskip("torchao.quantization")
    config = {
        "int8": torchao.Int8WeightOnlyConfig,
        "w8a8": torchao.Int8DynamicActivationInt8WeightConfig,
    }[kind]
    settings = {name: getattr(torchao, value)() for name, value in settings.items()}
    torchao.quantize_(
        block.requires_grad_(False),
        config(set_inductor_config=False, **settings),
        lambda module, name: isinstance(module, nn.Linear) and (names is None or name in names),
    )
    return block


def exact(block):
    """The block with what quantised weights stand for, in float64."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            weight, bias = module.weight, module.bias
            if type(weight).__name__ == "Int8Tensor":
                weight = weight.qdata.double() * weight.scale.double()
            module.weight = nn.Parameter(weight.double(), requires_grad=False)
            if bias is not None:
                module.bias = nn.Parameter(bias.double(), requires_grad=False)
    return block


def check_quantized(block, out):
    expected = exact(block)(token().double())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_quantised_weights_are_read_as_they_are(made, kind, calls):
    block = quantized(made, kind)
    with SingleTokenLinear():
        out = block(token())
    assert calls == [(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 0, 1)]
    check_quantized(block, out)


BACKENDS = [
    None,
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not which("g++"), reason="needs g++")),
]


@pytest.mark.parametrize("then", BACKENDS)
@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_quantised_layers_are_joined(made, kind, then, calls):
    block = quantized(made, kind)
    run = compiled(block, then)
    with torch.no_grad():
        run(token())
        calls.clear()
        out = run(token())
    assert calls == [(3, 3, 3), (1, 1, 1)]
    check_quantized(block, out)


@pytest.mark.parametrize("then", BACKENDS)
def test_quantised_gates_become_one_call(then, calls):
    block = quantized(Gated(nn.SiLU()))
    with torch.no_grad():
        out = compiled(block, then)(token())
    assert calls == [("silu", 2), (1, 1, 1)]
    check_quantized(block, out)


def test_quantised_and_plain_layers_are_not_joined(made, calls):
    block = quantized(made, names=["first.0", "first.2"])
    out = compiled(block)(token())
    assert sorted(calls) == [(1, 1), (1, 1), (2, 2, 2)]
    check_quantized(block, out)


def test_a_gate_and_a_layer_of_another_kind_are_two_calls(calls):
    block = quantized(Gated(nn.SiLU()), names=["gate"])
    out = compiled(block)(token())
    assert sorted(calls) == [(1, 0), (1, 0, 1), (1, 1)]
    check_quantized(block, out)


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_more_tokens_are_left_to_torchao(made, kind, calls):
    block = quantized(made, kind)
    with SingleTokenLinear():
        out = block(token(3))
    assert torch.equal(out, block(token(3)))
    torch.testing.assert_close(compiled(block)(token(3)), out)
    assert calls == []


@pytest.mark.parametrize("running", [True, False], ids=["running", "compiled"])
def test_weights_with_one_scale_are_left_to_torchao(made, running, calls):
    block = quantized(made, granularity="PerTensor")
    expected = block(token())
    if running:
        with SingleTokenLinear():
            out = block(token())
    else:
        out = compiled(block)(token())
    torch.testing.assert_close(out, expected)
    assert calls == []


def test_weights_whose_token_is_scaled_are_left_to_torchao(made, calls):
    block = quantized(made)
    block.last.weight.act_pre_scale = torch.full((1, 8), 2.0)
    expected = block(token())
    with SingleTokenLinear():
        torch.testing.assert_close(block(token()), expected)
    assert calls == [(1, 1, 1)] * 3
