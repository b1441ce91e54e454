"""N samples of a prompt of P tokens cost P + N - 1 prefilled tokens, from lm-eval and from us."""

from pathlib import Path
from typing import Any

import pytest
from scripted_lm import evaluate

from lm_eval_tasks.cli import main
from lm_eval_tasks.samples import SampleStore
from lm_eval_tasks.sampling import vllm_backend
from lm_eval_tasks.sampling.vllm_backend import VllmBackend
from lm_eval_tasks.vllm_hook import install_vllm_hook

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODELS = Path(__file__).resolve().parents[3] / "thinkfast"
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 4}
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
NUM_PROBLEMS, NUM_SAMPLES, MAX_TOKENS = 3, 6, 8
"""More samples than run at once: later ones find the state when nobody decodes the prompt."""


@pytest.fixture(scope="module", params=["llamba-tiny", "mambainllama-tiny"])
def lm(request: pytest.FixtureRequest) -> Any:
    """lm-eval's vLLM class; its engine serves all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        from lm_eval.models.vllm_causallms import VLLM

        folder = str(MODELS / request.param)
        return VLLM(pretrained=folder, disable_log_stats=False, seed=1234, **ENGINE)


def test_sample_command(lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(model: str, engine_args: dict[str, Any], max_in_flight: int | None) -> VllmBackend:
        return VllmBackend(lm.model.llm_engine, None, max_in_flight)

    monkeypatch.setattr(vllm_backend, "start_vllm", start)
    command = ["sample", "--model", lm.model_args["model"], "--task", "arith"]
    command += ["--limit", str(NUM_PROBLEMS), "--num-samples", str(NUM_SAMPLES)]
    command += ["--max-tokens", str(MAX_TOKENS), "--out", str(tmp_path / "run")]
    assert main([*command, "--engine-args", *(f"{k}={v}" for k, v in ENGINE.items())]) == 0
    prompts: dict[str, int] = {}
    prefilled: dict[str, int] = {}
    for record in SampleStore(tmp_path / "run").records():
        assert record.num_prompt_tokens is not None
        assert record.num_cached_tokens is not None
        prompts[record.problem_id] = record.num_prompt_tokens
        computed = record.num_prompt_tokens - record.num_cached_tokens
        prefilled[record.problem_id] = prefilled.get(record.problem_id, 0) + computed
    assert len(prompts) == NUM_PROBLEMS
    assert prefilled == {name: P + NUM_SAMPLES - 1 for name, P in prompts.items()}


def test_lm_eval(lm: Any) -> None:
    assert lm.model.llm_engine.reset_prefix_cache()
    install_vllm_hook()
    outputs: list[Any] = []
    generate = lm._model_generate

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found = generate(*args, **kwargs)
        outputs.extend(found)
        return found

    lm._model_generate = recorded
    try:
        evaluate(
            lm,
            "arith_passk",
            {"num_samples": NUM_SAMPLES, "pretrained": lm.model_args["model"]},
            limit=NUM_PROBLEMS,
            # The task refuses equal samples; hot ones differ within a few tokens.
            gen_kwargs=f"max_gen_toks={MAX_TOKENS},temperature=2.0",
        )
    finally:
        del lm._model_generate
    assert len(outputs) == NUM_PROBLEMS * NUM_SAMPLES
    prefilled: dict[tuple[int, ...], int] = {}
    for output in outputs:
        prompt = tuple(output.prompt_token_ids)
        prefilled[prompt] = prefilled.get(prompt, 0) + len(prompt) - output.num_cached_tokens
    assert len(prefilled) == NUM_PROBLEMS
    assert all(found == len(P) + NUM_SAMPLES - 1 for P, found in prefilled.items()), prefilled
