"""vLLM in process: the same samples as lm-eval draws, times, kill -9 and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_checkpoint import build_checkpoint

from lm_eval_tasks.cli import main
from lm_eval_tasks.commands import sample as sample_command
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.samples import SEED_FIELDS, SampleStore, run_key, sample_seed
from lm_eval_tasks.sampling import vllm_backend
from lm_eval_tasks.sampling.vllm_backend import EngineTap, VllmBackend
from lm_eval_tasks.throughput import read_throughput

ROOT = Path(__file__).resolve().parents[3]
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 1024,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
NUM_PROBLEMS, NUM_SAMPLES, MAX_TOKENS = 12, 8, 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def lm(checkpoint: str) -> Any:
    """lm-eval's vLLM class; its engine serves all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(pretrained=checkpoint, disable_log_stats=False, seed=1234, **ENGINE)


@pytest.fixture
def run_folder(lm: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the sample command with the shared engine in place of a new one; return its folder."""
    import torch

    started: list[tuple[str, dict[str, Any]]] = []

    def start(model: str, engine_args: dict[str, Any], max_in_flight: int | None) -> VllmBackend:
        given = dict(engine_args)
        torch.manual_seed(given.pop("seed", 0))  # as an engine does when it starts
        started.append((model, given))
        return VllmBackend(lm.model.llm_engine, None, max_in_flight)

    monkeypatch.setattr(vllm_backend, "start_vllm", start)

    def run(*more: str, folder: Path = tmp_path / "run", code: int = 0) -> SampleStore:
        assert main([*command(checkpoint, folder)[2:], *more]) == code
        assert all(each == (checkpoint, ENGINE) for each in started)
        return SampleStore(folder)

    return run


def command(checkpoint: str, folder: Path) -> list[str]:
    engine_args = [f"{key}={value}" for key, value in ENGINE.items()]
    return [
        *("-m", "lm_eval_tasks.cli", "sample", "--model", checkpoint, "--task", "arith"),
        *("--limit", str(NUM_PROBLEMS), "--num-samples", str(NUM_SAMPLES)),
        *("--max-tokens", str(MAX_TOKENS), "--out", str(folder)),
        *("--engine-args", *engine_args),
    ]


def _is_vllm(pid: str) -> bool:
    try:
        return "VLLM" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def texts(store: SampleStore) -> dict[tuple[str, int], tuple[str, int, str]]:
    return {r.key: (r.text, r.num_tokens, r.finish_reason) for r in store.records()}


def lm_eval_texts(lm: Any, checkpoint: str) -> dict[tuple[str, int], tuple[str, int, str]]:
    """Draw the same samples with the lm-eval task."""
    from scripted_lm import evaluate

    found: dict[tuple[str, int], tuple[str, int, str]] = {}
    generate = lm.generate_until

    def recorded(requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        sampled = generate(requests, disable_tqdm)
        seen: Counter[str] = Counter()
        for request, text in zip(requests, sampled, strict=True):
            key = (request.problem, seen[request.problem])
            found[key] = (str(text), text.num_tokens, text.finish_reason)
            seen[request.problem] += 1
        return sampled

    lm.generate_until = recorded
    try:
        evaluate(
            lm,
            "arith_passk",
            {"num_samples": NUM_SAMPLES, "pretrained": checkpoint},
            limit=NUM_PROBLEMS,
            gen_kwargs=f"max_gen_toks={MAX_TOKENS}",
        )
    finally:
        del lm.generate_until
    return found


# -- with an engine -------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.slow
def test_same_samples_as_lm_eval_also_after_a_kill(
    lm: Any, checkpoint: str, run_folder: Any, tmp_path: Path
) -> None:
    from lm_eval_tasks.vllm_hook import install_vllm_hook

    install_vllm_hook()
    by_lm_eval = lm_eval_texts(lm, checkpoint)
    assert len(by_lm_eval) == NUM_PROBLEMS * NUM_SAMPLES
    assert len({text for text, _, _ in by_lm_eval.values()}) == len(by_lm_eval)

    # A process of its own, with an engine of its own, killed in the middle.
    folder = tmp_path / "killed"
    file = folder / "samples.jsonl"
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # the command's default is under test
    log = tmp_path / "log"
    with (
        log.open("wb") as opened,
        subprocess.Popen(
            [sys.executable, *command(checkpoint, folder)],
            env=environment,
            stdout=opened,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        deadline = time.monotonic() + 600
        while not file.exists() or file.read_bytes().count(b"\n") < 20:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert not [pid for pid in children if _is_vllm(pid)], "an engine would outlive the kill"
    before = list(SampleStore(folder).records())
    assert 20 <= len(before) < NUM_PROBLEMS * NUM_SAMPLES

    store = run_folder(folder=folder)
    records = list(store.records())
    assert records[: len(before)] == before
    assert len(records) == NUM_PROBLEMS * NUM_SAMPLES
    assert texts(store) == by_lm_eval
    assert [s["session"] for s in store.sessions()] == [0, 1]
    key = run_key(store.config())
    assert checkpoint not in key, "it tells models apart by their files, wherever they lie"
    assert all(r.seed == sample_seed(1234, r.problem_id, r.sample_index, key) for r in records)


@pytest.mark.engine
@pytest.mark.slow
def test_latency_regime_more_samples_and_times(run_folder: Any) -> None:
    small = ("--regime", "latency", "--limit", "3", "--max-tokens", "8")
    store = run_folder(*small, "--num-samples", "2")
    assert len(texts(store)) == 6
    store = run_folder(*small)
    assert len(texts(store)) == 3 * NUM_SAMPLES
    first, second = store.sessions()
    assert (first["drawn"], second["drawn"]) == (6, 18)
    assert len(second["resumed_problems"]) == 3
    assert second["engine"]["max_num_seqs"] == ENGINE["max_num_seqs"]
    assert second["engine"]["dtype"] == "float32"
    # VLLM_CPU_KVCACHE_SPACE, in whole blocks.
    assert 0.99 * 2**30 < second["engine"]["cache_bytes"] <= 2**30
    for record in store.records():
        assert record.first_token_s is not None
        assert 0 <= record.submit_s < record.first_token_s <= record.finish_s
        assert record.num_tokens <= 8
        assert record.num_prompt_tokens > 100
        assert record.num_cached_tokens is not None
        assert not record.is_truncated or record.num_tokens == 8
    # The warm-up leaves nothing in the prefix cache: the first sample of a session pays in full.
    earliest = min(store.records(), key=lambda r: (r.session, r.submit_s))
    assert earliest.num_cached_tokens == 0
    assert second["cached_tokens"] > 0


@pytest.mark.engine
@pytest.mark.slow
def test_sessions_without_seeds_do_not_repeat_random_numbers(
    run_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both_sessions(folder: Path) -> list[set[str]]:
        few = ("--seed", "-1", "--limit", "1", "--num-samples")
        run_folder(*few, "4", folder=folder)
        store = run_folder(*few, "8", folder=folder)
        records = list(store.records())
        assert {r.seed for r in records} == {None}
        assert sorted(r.sample_index for r in records) == list(range(8))
        return [{r.text for r in records if r.session == number} for number in (0, 1)]

    first, second = both_sessions(tmp_path / "a")
    assert len(first | second) == 8
    store = SampleStore(tmp_path / "a")
    assert len({session["engine_seed"] for session in store.sessions()}) == 2
    assert store.config()["seed"] is None
    # What it guards against: an engine that starts with the seed it started with before.
    monkeypatch.setattr(sample_command, "_engine_seed", lambda store: 0)
    first, second = both_sessions(tmp_path / "b")
    assert first == second


@pytest.mark.engine
@pytest.mark.slow
def test_run_of_an_earlier_version_goes_on_with_its_seeds(run_folder: Any, tmp_path: Path) -> None:
    few = ("--limit", "2", "--max-tokens", "4", "--num-samples")
    folder = tmp_path / "old"
    store = run_folder(*few, "1", folder=folder)
    config = store.config()
    assert config.pop("seed_fields") == list(SEED_FIELDS)
    (folder / "config.json").write_text(json.dumps(config))
    records = list(run_folder(*few, "3", folder=folder).records())
    assert len(records) == 6
    for record in records[2:]:
        assert record.seed == sample_seed(1234, record.problem_id, record.sample_index)
    assert "seed_fields" not in store.config()


@pytest.mark.engine
@pytest.mark.slow
def test_vllm_that_refuses(
    lm: Any, run_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the warm-up, and when a request comes that it does not take: one line, nothing lost."""
    engine = lm.model.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "reset_prefix_cache", lambda: False)
        run_folder(code=2)
    said = capsys.readouterr().err
    assert "error: vLLM did not empty its prefix cache" in said
    assert "nothing was drawn, 0 of 96 samples are stored" in said

    add, names = engine.add_request, []

    def refusing(name: str, *rest: Any) -> Any:
        if not name.startswith("warm-up"):
            names.append(name)
        if len(names) > 20:
            raise ValueError("no room\nfor it")
        return add(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "add_request", refusing)
        store = run_folder(code=2)
    assert not engine.has_unfinished_requests()
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    stored = len(texts(store))
    assert f"vLLM stopped (ValueError: no room for it); {stored} of 96 samples are stored" in said
    assert 0 < stored < 21


@pytest.mark.engine
@pytest.mark.slow
def test_prompt_that_does_not_fit(
    lm: Any, run_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm.model.llm_engine.model_config, "max_model_len", 100)
    store = run_folder(code=2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "tokens and the model's length is 100; give --engine-args max_model_len=..." in said[0]
    assert list(store.records()) == []


@pytest.mark.engine
@pytest.mark.slow
def test_samples_are_cut_where_the_model_ends(
    lm: Any, run_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm.model.llm_engine.model_config, "max_model_len", 320)
    store = run_folder("--max-tokens", "300", "--num-samples", "1", "--limit", "2")
    (session,) = store.sessions()
    assert session["num_shortened_problems"] == 2
    for record in store.records():
        assert record.num_prompt_tokens + record.num_tokens <= 320


@pytest.mark.engine
@pytest.mark.slow
def test_engine_that_breaks_down(
    lm: Any, run_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = lm.model.llm_engine
    step, calls = engine.step, []

    def failing() -> Any:
        calls.append(1)
        if len(calls) > 60:
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(engine, "step", failing)
    store = run_folder(code=2)
    monkeypatch.undo()
    assert not engine.has_unfinished_requests(), "unfinished requests are given up"
    stored = len(texts(store))
    assert f"RuntimeError: out of memory); {stored} of 96 samples" in capsys.readouterr().err
    assert 0 < stored < 96


@pytest.mark.engine
@pytest.mark.slow
def test_sample_that_vllm_gives_up(
    lm: Any, run_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others that finish in the same step are stored all the same."""
    engine = lm.model.llm_engine
    step, finished = engine.step, []

    def aborting() -> Any:
        outputs = step()
        ours = [output for output in outputs if not output.request_id.startswith("warm-up")]
        if ours and not finished:
            ours[0].outputs[0].finish_reason = "abort"
            finished.extend(output.request_id for output in ours)
        return outputs

    monkeypatch.setattr(engine, "step", aborting)
    store = run_folder("--max-tokens", "1", code=2)
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert f"vLLM ended {finished[0]} with 'abort'; {len(finished) - 1} of 96 samples" in said
    assert {f"{p}#{j}" for p, j in texts(store)} == set(finished[1:])
    assert len(finished) > 1


# -- without one ----------------------------------------------------------------------------------


def test_tap_counts_since_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(vllm_backend, "time", SimpleNamespace(monotonic=lambda: clock.now))
    tap = EngineTap()
    assert tap.mean_running is None

    def step(seconds: float, running: int, preempted: int = 0) -> None:
        clock.now += seconds
        tap.record(
            SimpleNamespace(num_running_reqs=running),
            SimpleNamespace(num_preempted_reqs=preempted),
            engine_idx=0,
        )

    step(1.0, running=99, preempted=9)
    tap.reset()
    step(5.0, running=4)  # the interval before the first step is not a step's
    step(1.0, running=4)
    step(3.0, running=2, preempted=1)
    assert tap.num_steps == 3
    assert tap.num_preemptions == 1
    assert tap.mean_running == pytest.approx((4 * 1 + 2 * 3) / 4)


@pytest.mark.engine
@pytest.mark.slow
def test_speeds_are_measured_by_the_engine_that_drew(
    lm: Any,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    starts = []

    def start(model: str, engine_args: dict[str, Any], max_in_flight: int | None) -> VllmBackend:
        starts.append(model)
        return VllmBackend(lm.model.llm_engine, EngineTap(), max_in_flight)

    monkeypatch.setattr(vllm_backend, "start_vllm", start)
    folder = tmp_path / "run"
    draw = [*command(checkpoint, folder)[2:], "--num-samples", "2", "--limit", "2"]
    draw += ["--speed-tokens", "16", "8", "--batch-sizes"]
    assert main([*draw, "1", "5"]) == 2
    assert "the engine runs at most 4 sequences at once" in capsys.readouterr().err
    assert list(SampleStore(folder).records()) == [], "refused before anything is drawn"
    for _ in range(2):
        assert main([*draw, "1", "4"]) == 0
    assert len(starts) == 2, "nothing was missing the last time"
    assert main([*draw, "1", "4", "--speed-round", "1"]) == 0
    assert len(starts) == 3
    rows = read_throughput(folder)
    assert [(row["round"], row["batch_size"]) for row in rows] == [(0, 1), (0, 4), (1, 1), (1, 4)]
    assert all(row["tokens_per_s"] == row["batch_size"] * 8 / row["seconds"] for row in rows)
    assert all(0 < row["prefill_s"] < row["seconds"] for row in rows)
    assert len(list(SampleStore(folder).records())) == 4


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"max_model_length": 5}, "did you mean max_model_len?"),
        ({"dtype": "float33"}, "vLLM cannot start .*float33"),
    ],
)
def test_wrong_engine_arguments(checkpoint: str, engine_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        vllm_backend.start_vllm(checkpoint, engine_args)


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_engine_that_does_not_start(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """What vLLM raises where memory is short, or for a value of another type."""
    from vllm.v1.engine.llm_engine import LLMEngine

    def fail(*_: Any, **__: Any) -> None:
        raise error("out of\nmemory")

    monkeypatch.setattr(LLMEngine, "from_engine_args", fail)
    with pytest.raises(ValueError, match=r"vLLM cannot start .* \(out of memory\)"):
        vllm_backend.start_vllm(checkpoint, {})


def test_weights_that_are_damaged(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Git LFS pointer read as a safetensors file asks for exabytes."""
    from vllm.v1.engine.llm_engine import LLMEngine

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(LLMEngine, "from_engine_args", fail)
    with pytest.raises(InputError, match=r"vLLM cannot start .* \(MemoryError; is one of its"):
        vllm_backend.start_vllm(checkpoint, {})


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vLLM cannot start"):
        vllm_backend.start_vllm(str(tmp_path / "nothing"), {})
