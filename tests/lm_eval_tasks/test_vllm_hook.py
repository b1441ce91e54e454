"""The hook into lm-eval's vLLM class, with stand-ins; the engine test has the real classes."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from scripted_lm import GSM8K_ROWS, ScriptedLM, evaluate, write_jsonl

from lm_eval_tasks.samples import SEED_FIELDS, SampledText, run_key, sample_seed
from lm_eval_tasks.vllm_hook import SampleRequest, install_vllm_hook

ORIGINAL_TEXT = "by lm-eval"
KEY = run_key(
    {
        "model_id": "some/model@main",
        "temperature": 0.7,
        "top_p": 1.0,
        "max_tokens": 1024,
        "regime": "saturated",
        "seed_fields": list(SEED_FIELDS),
    }
)
"""That of the store's run with the task's defaults."""


@dataclass
class StandInParams:
    """vLLM's SamplingParams, as far as the tasks set it."""

    max_tokens: int
    stop: list[str]
    seed: int | None
    temperature: float
    top_p: float


class StandInVLLM(ScriptedLM):
    """The part of lm-eval's VLLM that the hook relies on."""

    think_end_token = None
    eot_token_id = 1
    max_gen_toks = 256
    max_length = 400

    def __init__(self) -> None:
        super().__init__(lambda prompt, j: ORIGINAL_TEXT)
        self.batch_size: int | str = 1
        self.model_args = {"seed": 1234, "model": "some/model"}
        self.tokenizer = SimpleNamespace(decode=lambda token: "</s>", eos_token="</s>")
        self.submissions: list[tuple[list[list[int]], list[Any], int | str]] = []

    def tok_encode(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    @staticmethod
    def modify_gen_kwargs(
        settings: dict[str, Any], eos: str, default_max_gen_toks: int
    ) -> tuple[dict[str, Any], list[str], int]:
        settings = dict(settings)
        settings.pop("do_sample", None)
        max_tokens = settings.pop("max_gen_toks", default_max_gen_toks)
        return settings, [*settings.pop("until"), eos], max_tokens

    def _model_generate(
        self, requests: list[list[int]], generate: bool, sampling_params: list[Any]
    ) -> list[Any]:
        assert generate
        self.submissions.append((requests, sampling_params, self.batch_size))
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        text=f"seed {params.seed}: \\boxed{{5}}</s>tail",
                        token_ids=[0] * 9,
                        finish_reason="length" if number % 4 == 0 else "stop",
                    )
                ]
            )
            for number, params in enumerate(sampling_params)
        ]


@pytest.fixture
def vllm_class(monkeypatch: pytest.MonkeyPatch) -> type[StandInVLLM]:
    class VLLM(StandInVLLM):
        """A fresh class per test, since the hook changes the class."""

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            return super().generate_until(requests, disable_tqdm)

    module = ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM  # type: ignore[attr-defined]
    vllm = ModuleType("vllm")
    vllm.SamplingParams = StandInParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return VLLM


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "rows.jsonl", GSM8K_ROWS))


def _run(lm: StandInVLLM, data: str, **kwargs: Any) -> tuple[dict[str, Any], list[Any]]:
    results = evaluate(lm, "gsm8k_passk", {"num_samples": 4, "data_file": data}, **kwargs)
    (submission,) = lm.submissions
    return results, submission[1]


def test_one_submission_with_a_seed_per_sample(vllm_class: type[StandInVLLM], data: str) -> None:
    lm = vllm_class()
    results, params = _run(lm, data)
    prompts, _, batch_size = lm.submissions[0]
    assert len(prompts) == 12
    assert batch_size == "auto"
    assert lm.batch_size == 1
    assert [p.seed for p in params] == [
        sample_seed(1234, f"gsm8k/{i}", j, KEY) for i in range(3) for j in range(4)
    ]
    assert {p.stop[0] for p in params} == {"</s>"}
    assert {(p.temperature, p.top_p) for p in params} == {(0.7, 1.0)}
    found = results["results"]["gsm8k_passk"]
    assert found["n_distinct,all"] == 1.0
    assert found["truncated,all"] == 0.25
    assert found["gen_tokens,all"] == 9
    assert found["pass@1,all"] == pytest.approx(1 / 3)
    text = results["samples"]["gsm8k_passk"][0]["resps"][0][0]
    assert text == f"seed {params[0].seed}: \\boxed{{5}}", "cut at the stop string, as lm-eval does"


def test_run_seed(vllm_class: type[StandInVLLM], data: str) -> None:
    seeds = {}
    for name, settings in {"default": None, "7": "seed=7"}.items():
        _, params = _run(vllm_class(), data, gen_kwargs=settings)
        seeds[name] = [p.seed for p in params]
    assert len(set(seeds["7"])) == 12, "a seed in gen_kwargs does not make copies"
    assert not set(seeds["7"]) & set(seeds["default"])
    unseeded = vllm_class()
    with pytest.raises(ValueError, match="identical"):  # the stand-in writes its seed as text
        _run(unseeded, data, gen_kwargs="seed=-1")
    assert [p.seed for p in unseeded.submissions[0][1]] == [None] * 12


def test_seeds_do_not_depend_on_limit(vllm_class: type[StandInVLLM], data: str) -> None:
    _, every = _run(vllm_class(), data)
    _, first = _run(vllm_class(), data, limit=1)
    assert [p.seed for p in first] == [p.seed for p in every[:4]]


def test_prompts_are_never_cut(
    vllm_class: type[StandInVLLM], data: str, caplog: pytest.LogCaptureFixture
) -> None:
    lm = vllm_class()
    _, params = _run(lm, data)
    prompts = lm.submissions[0][0]
    assert all(
        len(prompt) + p.max_tokens == lm.max_length
        for prompt, p in zip(prompts, params, strict=True)
    )
    assert "12 of 12 samples get fewer than max_gen_toks tokens" in caplog.text
    lm = vllm_class()
    lm.max_length = 100
    with pytest.raises(ValueError, match=r"prompt of gsm8k/0 has \d+ tokens.*max_model_len"):
        _run(lm, data)


def test_misspelt_sampling_setting(vllm_class: type[StandInVLLM], data: str) -> None:
    with pytest.raises(ValueError, match=r"vLLM refuses .*top_q"):
        _run(vllm_class(), data, gen_kwargs="top_q=0.5")


def test_other_tasks_keep_lm_evals_path(vllm_class: type[StandInVLLM]) -> None:
    install_vllm_hook()
    install_vllm_hook()
    lm = vllm_class()
    settings = {"until": [], "max_gen_toks": 5, "temperature": 1.0, "top_p": 1.0}

    def request(kind: type[Instance], name: str, **extra: Any) -> Instance:
        return kind("generate_until", {}, (name, settings), 0, ("task", 0, 1), **extra)

    ours = request(SampleRequest, "ours", problem="t/1")
    other = request(Instance, "other")
    texts = lm.generate_until([other, ours, other, ours])
    assert [type(text) for text in texts] == [str, SampledText, str, SampledText]
    assert texts[0] == texts[2] == ORIGINAL_TEXT
    assert texts[1] != texts[3]
    assert [r.args[0] for r in lm.calls[0]] == ["other", "other"]
    assert len(lm.calls) == len(lm.submissions) == 1, "wrapped once, however often it is installed"
