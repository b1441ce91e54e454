"""A later vLLM without a name that a patch in every process wraps: a line in the log, no error."""

import pytest

from vllm_thinkfast import compat


def test_memory_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delattr(kv_cache_utils, "get_kv_cache_configs")
    compat._explain_lack_of_memory(("LlambaForCausalLM",))
    assert not hasattr(kv_cache_utils, "get_kv_cache_configs")
    (record,) = caplog.records
    assert "no get_kv_cache_configs" in record.getMessage()


@pytest.mark.parametrize("name", ["_sample", "_bookkeeping_sync"])
def test_cpu_seeds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The name that is left stays vLLM's own: half of the patch would be worse than none."""
    from vllm.platforms import current_platform
    from vllm.v1.worker import cpu_model_runner

    class Renamed:
        def _sample(self) -> None: ...

        def _bookkeeping_sync(self) -> None: ...

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: True)
    monkeypatch.setattr(cpu_model_runner, "CPUModelRunner", Renamed)
    monkeypatch.delattr(Renamed, name)
    before = dict(vars(Renamed))
    compat._restore_cpu_generators()
    assert dict(vars(Renamed)) == before
    (record,) = caplog.records
    assert "no CPUModelRunner._sample or ._bookkeeping_sync" in record.getMessage()


def test_cpu_runner(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.worker import cpu_model_runner

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: True)
    monkeypatch.delattr(cpu_model_runner, "CPUModelRunner")
    compat._restore_cpu_generators()
    assert len(caplog.records) == 1
