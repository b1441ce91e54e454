"""When forking is on, and the memory of prompt hashes; no engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_thinkfast import compat, envs, fork, plugin

MODELS = Path(__file__).parents[2] / "thinkfast"


def config(**cache: Any) -> Any:
    """The parts of vLLM's configuration that ``configure`` reads."""
    settings = {
        "enable_prefix_caching": True,
        "prefix_match_unit": None,
        "mamba_block_size": None,
        "user_specified_block_size": False,
        "prefix_cache_retention_interval": 0,
        **cache,
    }
    return SimpleNamespace(
        cache_config=SimpleNamespace(**settings),
        model_config=SimpleNamespace(max_model_len=2048),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=4096, enable_chunked_prefill=True),
        kv_transfer_config=None,
    )


def configured(
    vllm_config: Any, *, is_attention_free: bool = True, obstacle: str | None = None
) -> tuple[int | None, int | None]:
    """(match unit, state block size) after ``configure``."""
    fork.configure(vllm_config, is_attention_free=is_attention_free, obstacle=obstacle)
    cache = vllm_config.cache_config
    return cache.prefix_match_unit, cache.mamba_block_size


def test_configure() -> None:
    unit, block_size = configured(config())
    assert unit == 1
    assert block_size is not None
    assert block_size > 4096, "a sequence or a chunk could fill the block"
    assert block_size % 8 == 0
    assert configured(config(), is_attention_free=False) == (1, None)


@pytest.mark.parametrize(
    "setting",
    [
        {"mamba_block_size": 64},
        {"user_specified_block_size": True},
        {"prefix_cache_retention_interval": 512},
        {"prefix_cache_retention_interval": None},
    ],
    ids=lambda setting: "-".join(setting),
)
def test_configure_keeps_the_users_grid(setting: dict[str, Any]) -> None:
    vllm_config = config(**setting)
    assert configured(vllm_config) == (1, setting.get("mamba_block_size"))


def test_configure_keeps_the_users_unit() -> None:
    assert configured(config(prefix_match_unit=16)) == (16, None)


def test_configure_without_prefix_caching() -> None:
    assert configured(config(enable_prefix_caching=False)) == (None, None)


def test_configure_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(envs.FORK, "0")
    assert configured(config()) == (None, None)


def test_configure_says_why_not(caplog: pytest.LogCaptureFixture) -> None:
    assert configured(config(), obstacle="this vLLM is a potato") == (None, None)
    with_connector = config()
    with_connector.kv_transfer_config = object()
    assert configured(with_connector) == (None, None)
    assert ["potato" in caplog.text, "KV connector" in caplog.text] == [True, True]


def test_offloading_is_a_connector(caplog: pytest.LogCaptureFixture) -> None:
    """From the engine's arguments: vLLM makes the connector only after ``configure``."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    model = str(MODELS / "llamba-tiny")
    arguments = EngineArgs(model=model, enforce_eager=True, kv_offloading_size=0.1)
    vllm_config = arguments.create_engine_config()
    assert vllm_config.kv_transfer_config is not None
    assert vllm_config.cache_config.prefix_match_unit is None
    assert "prefill it for itself: a KV connector is configured." in caplog.text


@pytest.mark.parametrize(("switch", "num_warnings"), [("1", 1), ("0", 0)])
def test_configure_says_why_not_without_prefix_caching(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    switch: str,
    num_warnings: int,
) -> None:
    """Llamba where vLLM cannot fork: prefix caching is off then, by default or by the user."""
    monkeypatch.setenv(envs.FORK, switch)
    vllm_config = config(enable_prefix_caching=False)
    assert configured(vllm_config, obstacle="this vLLM is a potato") == (None, None)
    assert caplog.text.count("prefill it for itself: this vLLM is a potato.") == num_warnings
    caplog.clear()
    # Who switched off what would have worked is not told that it does not.
    vllm_config.kv_transfer_config = object()
    assert configured(vllm_config) == (None, None)
    assert not caplog.text


def test_an_old_vllm_says_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the engine's arguments to the log, in the default settings of Llamba."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    obstacle = "that needs vllm 0.32.0 or newer, found 0.31.2"
    monkeypatch.setattr(compat, "fork_obstacle", lambda: obstacle)
    model = str(Path(__file__).parents[2] / "thinkfast" / "llamba-tiny")
    vllm_config = EngineArgs(model=model, enforce_eager=True).create_engine_config()
    assert not vllm_config.cache_config.enable_prefix_caching
    assert f"Every sample of a prompt will prefill it for itself: {obstacle}." in caplog.text


@pytest.mark.parametrize("is_attention_free", [True, False])
def test_configure_without_chunked_prefill(
    is_attention_free: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM's defaults for state models allow it, so ours must not end in an error."""
    vllm_config = config()
    vllm_config.scheduler_config.enable_chunked_prefill = False
    assert configured(vllm_config, is_attention_free=is_attention_free) == (None, None)
    assert not vllm_config.cache_config.enable_prefix_caching
    assert "chunked prefill" in caplog.text


@pytest.mark.parametrize("name", ["llamba-tiny", "mambainllama-tiny"])
def test_vllm_without_chunked_prefill(name: str) -> None:
    from vllm import EngineArgs

    args = EngineArgs(model=str(MODELS / name), enforce_eager=True, enable_chunked_prefill=False)
    assert not args.create_engine_config().cache_config.enable_prefix_caching


@pytest.mark.skipif(not compat.has_drafts(), reason="drafts are refused with this vLLM")
def test_block_size_with_drafts() -> None:
    """vLLM's own message says that the option needs prefix caching, not who turned that off."""
    from vllm import EngineArgs

    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    args = EngineArgs(
        model=str(MODELS / "llamba-tiny"), mamba_block_size=64, speculative_config=drafts
    )
    with pytest.raises(ValueError, match=r"--mamba-block-size 64 with --speculative-config"):
        args.create_engine_config()


@pytest.mark.parametrize("value", ["yes", "2", "off"])
def test_environment_refuses(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(envs.FORK, value)
    with pytest.raises(ValueError, match=f"VLLM_THINKFAST_FORK={value}: accepted are 0 and 1"):
        envs.fork()


def test_fork_obstacle_of_the_tested_version() -> None:
    assert compat.fork_obstacle() is None


def test_fork_obstacle_of_an_old_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_distribution", lambda: ("vllm", "0.31.2"))
    assert compat.fork_obstacle.__wrapped__() == "that needs vllm 0.32.0 or newer, found 0.31.2"


def test_fork_obstacle_of_a_renamed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delattr(kv_cache_utils, "get_request_block_hasher")
    obstacle = compat.fork_obstacle.__wrapped__()
    assert obstacle == "this vLLM has no vllm.v1.core.kv_cache_utils.get_request_block_hasher"


@pytest.mark.parametrize("switch", ["1", "0"])
def test_prefix_caching_by_default(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    """On for Llamba, only for it, and only if forking is."""
    from vllm.config.model import ModelConfig

    plugin.register()
    monkeypatch.setenv(envs.FORK, switch)

    def is_supported(architecture: str, pooler_config: Any = None) -> bool:
        model_config = SimpleNamespace(
            architecture=architecture, attn_type="attention_free", pooler_config=pooler_config
        )
        supported: bool = ModelConfig.is_prefix_caching_supported.fget(model_config)
        return supported

    assert is_supported("LlambaForCausalLM") is (switch == "1")
    assert not is_supported("MambaForCausalLM")


class StandInRequest(SimpleNamespace):
    def __init__(self, prompt: list[int], **changes: Any) -> None:
        super().__init__(
            prompt_token_ids=prompt,
            block_hashes=[],
            num_output_tokens=0,
            prompt_embeds=None,
            mm_features=[],
            lora_request=None,
            cache_salt=None,
        )
        self.__dict__.update(changes)


def test_remember_prompts() -> None:
    """Equal prompts are hashed once; whatever else goes into the hash makes them unequal."""
    hashed: list[Any] = []

    def hasher(request: Any) -> list[bytes]:
        hashed.append(request)
        return [bytes([token]) for token in request.prompt_token_ids]

    remembering = fork.remember_prompts(hasher)
    assert [remembering(StandInRequest([1, 2])) for _ in range(5)] == [[b"\1", b"\2"]] * 5
    assert len(hashed) == 1
    for change in (
        {"cache_salt": "salt"},
        {"lora_request": object()},
        {"mm_features": [object()]},
        {"prompt_embeds": object()},
        {"block_hashes": [b"\1"]},
        {"num_output_tokens": 1},
    ):
        before = len(hashed)
        remembering(StandInRequest([1, 2], **change))
        assert len(hashed) == before + 1, change


def test_remember_prompts_forgets() -> None:
    hashed: list[int] = []

    def hasher(request: Any) -> list[bytes]:
        hashed.append(request.prompt_token_ids[0])
        return []

    remembering = fork.remember_prompts(hasher)
    first, *others = range(fork.NUM_REMEMBERED_PROMPTS + 1)
    for token in (first, *others, *others, first):
        remembering(StandInRequest([token]))
    assert hashed == [first, *others, first]


def test_copies_take_all_bytes_of_a_block() -> None:
    """Two layers of each kind in one allocation; the state's views are short and come first."""
    import torch

    pytest.importorskip("vllm.v1.worker.utils")
    if compat.fork_obstacle() is not None:
        pytest.skip("this vLLM cannot fork")
    plugin.register()
    from vllm.v1.worker import utils

    storage = torch.zeros(2, 3, 8, dtype=torch.int8)  # layers, blocks, bytes
    storage[:, 1] = torch.arange(1, 9, dtype=torch.int8)
    state = [layer[:, :3] for layer in storage]
    attention = [layer.view(3, 2, 4) for layer in storage]
    views = [state[0], attention[0], state[1], attention[1]]
    utils.copy_kv_cache_blocks_inplace(views, 3, [(1, 2)])
    assert torch.equal(storage[:, 2], storage[:, 1])
    assert not storage[:, 0].any()
