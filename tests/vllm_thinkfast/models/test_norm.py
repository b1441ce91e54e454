"""RMSNorm on CPU: the compiled kernel where it suits, vLLM's torch form elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.layernorm import RMSNorm

from tests.reference.published_models import reference_greedy
from tests.reference.random_checkpoints import write_checkpoint
from tests.tolerances import assert_close
from tests.vllm_thinkfast.models.engines import EnginePool, greedy
from vllm_thinkfast.layers import norm
from vllm_thinkfast.layers.norm import CpuRMSNorm, rms_norm

EPS = 1e-5


@pytest.fixture(autouse=True)
def _config() -> Iterator[None]:
    """A layer asks the configuration whether vLLM compiles it."""
    with set_current_vllm_config(VllmConfig()):
        yield


def _layer(width: int, dtype: torch.dtype) -> CpuRMSNorm:
    layer = rms_norm(width, eps=EPS, dtype=dtype)
    assert isinstance(layer, CpuRMSNorm)
    layer.weight.data.copy_(torch.randn(width))
    return layer


def _expected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(0, 32), (1, 16), (3, 576), (65, 2048), (3, 24)])
@torch.inference_mode()
def test_values(tokens: int, width: int, dtype: torch.dtype) -> None:
    """The width 24 is no multiple of 16 and takes the torch form."""
    layer = _layer(width, dtype)
    x = 3 * torch.randn(tokens, width).to(dtype)
    before = x.clone()
    assert_close(layer.forward_cpu(x), _expected(x, layer.weight), "operator")
    assert torch.equal(x, before)
    residual = torch.randn(tokens, width).to(dtype)
    total, exact = x + residual, x.double() + residual.double()
    normed, added = layer.forward_cpu(x, residual)
    assert torch.equal(added, total)
    assert_close(normed, _expected(exact, layer.weight), "operator")


@torch.inference_mode()
def test_rows_do_not_depend_on_others() -> None:
    layer, x = _layer(576, torch.float32), torch.randn(64, 576)
    residual = torch.randn(64, 576)
    alone = [
        layer.forward_cpu(x[i : i + 1].clone(), residual[i : i + 1].clone()) for i in range(64)
    ]
    normed, added = layer.forward_cpu(x, residual)
    assert torch.equal(normed, torch.cat([n for n, _ in alone]))
    assert torch.equal(added, torch.cat([a for _, a in alone]))


def _refuse(self: RMSNorm, *arguments: torch.Tensor) -> None:
    raise AssertionError("the torch form was called")


def test_what_does_not_suit_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RMSNorm, "forward_native", _refuse)
    layer = _layer(32, torch.float32)
    x, wide = torch.randn(3, 32), torch.randn(3, 64)
    layer.forward_cpu(x)
    layer.forward_cpu(x, wide[:, :32].contiguous())
    before = wide.clone()
    for arguments in ((x.bfloat16(),), (wide[:, :32],), (x, wide[:, :32]), (x, x.bfloat16())):
        with pytest.raises(AssertionError, match="torch form"):
            layer.forward_cpu(*arguments)
    assert torch.equal(wide, before)
    with pytest.raises(AssertionError, match="torch form"):
        _layer(24, torch.float32).forward_cpu(torch.randn(3, 24))


def test_without_a_kernel_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on ARM processors without bfloat16, whose build says that it is not implemented."""
    assert norm._has_kernel(torch.bfloat16)
    assert not norm._has_kernel(torch.float64)
    monkeypatch.setattr(norm, "_has_kernel", lambda dtype: False)
    layer, x = _layer(32, torch.float32), torch.randn(3, 32)
    assert_close(layer.forward_cpu(x), _expected(x, layer.weight), "operator")
    monkeypatch.setattr(RMSNorm, "forward_native", _refuse)
    with pytest.raises(AssertionError, match="torch form"):
        layer.forward_cpu(x)


def test_another_plugins_layer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(RMSNorm):
        pass

    monkeypatch.setitem(op_registry_oot, "RMSNorm", Theirs)
    layer = rms_norm(32, eps=EPS)
    assert type(layer) is Theirs
    assert layer.weight.shape == (32,)
    assert layer.variance_epsilon == EPS


@pytest.mark.engine
def test_every_norm_of_a_model(
    family_folder: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a hybrid's attention layers too."""
    llm = engines.get(family_folder)
    monkeypatch.setattr(RMSNorm, "forward_native", _refuse)
    prompt = [3, 14, 15]
    assert greedy(llm, [prompt], 4)[0] == reference_greedy(family_folder, prompt, 4)


@pytest.mark.engine
@pytest.mark.slow
def test_in_a_compiled_model(
    tmp_path: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where custom_ops asks for the kernel; by default the norm is left to the compiler."""
    folder = write_checkpoint(tmp_path / "ckpt", "llamba", seed=11)
    monkeypatch.setattr(RMSNorm, "forward_native", _refuse)
    compilation = {"custom_ops": ["none", "+rms_norm"]}
    llm = engines.get(folder, enforce_eager=False, compilation_config=compilation)
    prompt = [3, 14, 15]
    assert greedy(llm, [prompt], 4)[0] == reference_greedy(folder, prompt, 4)
