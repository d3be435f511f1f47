"""Every family computes what `transformers` computes: logits, loss, gradient and exact Hessian-vector product.

The torch reference for second derivatives is double backward; its forward-mode derivative of LayerNorm is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import VOCAB, torch, torch_model, write_checkpoint
from safetensors.torch import save_file

import convert
from jaxhess.data import TokenBatch
from jaxhess.models import LanguageModel

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Name, family, options, and whether its derivatives are compared too (they cost seconds of compilation).
CASES: list[tuple[str, str, dict[str, Any], bool]] = [
    ("llama", "llama", {}, False),
    ("llama tied, one key head, odd vocabulary", "llama",
     {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 37}, True),
    ("llama all key heads, one layer, biases", "llama",
     {"num_key_value_heads": 4, "num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}, False),
    ("llama llama3, one layer, biases", "llama",
     {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}, "num_hidden_layers": 1,
      "attention_bias": True, "mlp_bias": True}, True),
    ("llama wide heads", "llama", {"head_dim": 10, "rope_theta": 500.0}, False),
    ("llama linear", "llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}, False),
    ("llama dynamic, beyond its context", "llama",
     {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}, False),
    ("llama yarn, one layer", "llama", {"rope_scaling": YARN, "num_hidden_layers": 1}, True),
    ("llama gelu", "llama", {"hidden_act": "gelu"}, False),
    ("mistral window", "mistral", {"sliding_window": 5}, True),
    ("mistral no window, wide heads", "mistral", {"head_dim": 6}, False),
    ("qwen2", "qwen2", {}, True),
    ("qwen2 tied, upper layers slide", "qwen2",
     {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, True),
    ("qwen2 yarn", "qwen2", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}, False),
    ("qwen3", "qwen3", {}, False),
    ("qwen3 tied, one key head, biases, first layer slides", "qwen3",
     {"tie_word_embeddings": True, "num_key_value_heads": 1, "attention_bias": True, "use_sliding_window": True,
      "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}, True),
    ("gpt_neox", "gpt_neox", {}, False),
    ("gpt_neox one after the other, all rotary, tied", "gpt_neox",
     {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True}, True),
    ("gpt_neox no attention bias, yarn", "gpt_neox",
     {"attention_bias": False, "rope_scaling": YARN, "hidden_act": "gelu_new"}, False),
    ("gpt2", "gpt2", {}, True),
    ("gpt2 untied, wide feed-forward, relu", "gpt2",
     {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu", "n_layer": 1}, False),
]  # fmt: skip
DERIVATIVES = [case for case in CASES if case[3]]
SEQUENCES, LENGTH = 2, 20
# The same program with LLVM's optimisations off: a third of the compile time, which is nearly all of the tests' time.
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any, LanguageModel]]:
    """The checkpoint directory, torch model and our model of a case, made once."""
    made: dict[str, tuple[Path, Any, LanguageModel]] = {}

    def make(name: str, family: str, options: dict[str, Any], _: bool) -> tuple[Path, Any, LanguageModel]:
        if name not in made:
            directory = tmp_path_factory.mktemp("checkpoint")
            reference = write_checkpoint(directory, family, **options)
            made[name] = directory, reference, convert.load(directory)
        return made[name]

    return make


def tokens_for(vocab: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (SEQUENCES, LENGTH + 1), dtype=np.int32)


def batch_of(tokens: np.ndarray) -> TokenBatch:
    return TokenBatch(jnp.asarray(tokens), jnp.ones((SEQUENCES, LENGTH), jnp.float32))


def torch_loss(model: Any, tokens: np.ndarray) -> torch.Tensor:
    inputs = torch.from_numpy(tokens).long()
    logits = model(inputs[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), inputs[:, 1:].reshape(-1))


def torch_derivatives(model: Any, tokens: np.ndarray) -> tuple[dict[str, torch.Tensor], ...]:
    """A random direction, the gradient, and the Hessian times the direction by double backward; by parameter name."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(2)
    direction = {k: torch.randn(p.shape, generator=generator).to(p.dtype) for k, p in parameters.items()}
    gradient = torch.autograd.grad(torch_loss(model, tokens), list(parameters.values()), create_graph=True)
    slope = sum((g * direction[k]).sum() for k, g in zip(parameters, gradient, strict=True))
    product = torch.autograd.grad(slope, list(parameters.values()))
    return direction, dict(zip(parameters, gradient, strict=True)), dict(zip(parameters, product, strict=True))


def as_params(tensors: dict[str, torch.Tensor], checkpoint: Path, directory: Path) -> Any:
    """Tensors named and shaped as torch's parameters, in our layout: a checkpoint of them, converted."""
    directory.mkdir()
    (directory / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, directory / "model.safetensors")
    return convert.load(directory).params


def derivatives(model: LanguageModel, tokens: np.ndarray, direction: Any) -> tuple[jax.Array, Any, Any]:
    """Mean loss, its gradient, and the Hessian times `direction`."""
    loss, batch = model.loss(), batch_of(tokens)

    def mean(params: Any) -> jax.Array:
        total, count = loss(params, batch)
        return total / count

    def all_three(params: Any, direction: Any) -> tuple[jax.Array, Any, Any]:
        with jax.default_matmul_precision("highest"):
            (value, gradient), (_, product) = jax.jvp(jax.value_and_grad(mean), (params,), (direction,))
        return value, gradient, product

    return jax.jit(all_three, compiler_options=QUICK)(model.params, direction)


def assert_close(ours: Any, theirs: Any, relative: float) -> None:
    """Agreement in norm over all parameters, and of each parameter on its own scale.

    That scale is at least a hundredth of the largest: some gradients (GPT-2's key bias) are zero but for rounding.
    """
    pairs = jax.tree.leaves_with_path(jax.tree.map(lambda a, b: (np.asarray(a), np.asarray(b)), ours, theirs),
                                      is_leaf=lambda x: isinstance(x, tuple))  # fmt: skip
    largest = max(np.abs(b).max() for _, (_, b) in pairs)
    difference = np.sqrt(sum(np.sum(np.square(a - b)) for _, (a, b) in pairs))
    norm = np.sqrt(sum(np.sum(np.square(b)) for _, (_, b) in pairs))
    assert difference <= relative * norm
    for path, (a, b) in pairs:
        error = np.abs(a - b).max() / max(np.abs(b).max(), largest / 100)
        assert error <= relative, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_logits_and_loss_are_those_of_torch(case: Any, pair: Any) -> None:
    _, reference, model = pair(*case)
    tokens = tokens_for(model.config.vocab_size)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()[:, :-1]).logits.numpy()
        loss = float(torch_loss(reference, tokens))

    def both(params: Any) -> tuple[jax.Array, jax.Array]:
        total, count = model.loss()(params, batch_of(tokens))
        return dataclasses.replace(model, params=params).logits(jnp.asarray(tokens[:, :-1])), total / count

    logits, mean = jax.jit(both, compiler_options=QUICK)(model.params)
    assert np.abs(np.asarray(logits) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert abs(float(mean) - loss) <= 1e-6 * loss


@pytest.mark.parametrize("case", DERIVATIVES, ids=[case[0] for case in DERIVATIVES])
def test_gradient_and_hvp_are_those_of_double_backward(case: Any, pair: Any, tmp_path: Path) -> None:
    directory, reference, model = pair(*case)
    tokens = tokens_for(model.config.vocab_size)
    expected = [
        as_params(tensors, directory, tmp_path / str(i))
        for i, tensors in enumerate(torch_derivatives(reference, tokens))
    ]
    _, gradient, product = derivatives(model, tokens, expected[0])
    assert_close(gradient, expected[1], 1e-4)
    assert_close(product, expected[2], 1e-4)


@contextlib.contextmanager
def float64_throughout(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`model` in float64, its float32 islands too: RMSNorm, softmax and the rotary tables."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
            )
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = lambda x, position_ids, m=module: rotary_tables(m, position_ids)
    yield model


def rotary_tables(module: Any, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    theta = module.config.rope_parameters["rope_theta"]
    dims = 2 * module.inv_freq.numel()
    rates = theta ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.cat([position_ids[..., None] * rates] * 2, -1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2"])
def test_float64_agrees_to_1e9_once_torch_computes_in_float64(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transformers` alone leaves about 1e-7: its RMSNorm, softmax and rotary tables stay in float32."""
    with float64_throughout(torch_model(family), monkeypatch) as reference, jax.enable_x64(True):
        reference.save_pretrained(tmp_path / "checkpoint")
        config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
        assert config["dtype"] == "float64"
        model = convert.load(tmp_path / "checkpoint")
        assert model.config.dtype == "float64"
        tokens = tokens_for(VOCAB)
        expected = [
            as_params(tensors, tmp_path / "checkpoint", tmp_path / str(i))
            for i, tensors in enumerate(torch_derivatives(reference, tokens))
        ]
        value, gradient, product = derivatives(model, tokens, expected[0])
        assert abs(float(value) - torch_loss(reference, tokens).item()) <= 1e-12 * float(value)
        assert_close(gradient, expected[1], 1e-10)
        assert_close(product, expected[2], 1e-10)
