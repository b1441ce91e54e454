"""One engine of ``scripts/state_study.py``, in a process of its own.

    python -m scripts.state_study_engine MODEL STORE PROBLEMS SAMPLES OUT.json [INPUTS.pt]

Samples ``arith_passk`` with lm-eval, then continues the problems greedily in the same engine, with
the SSM state stored as STORE (int8 comes from the environment). With INPUTS.pt it also records
what the recurrences get for the problems and their solutions.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from demo.settings import code_hash, file_hash, folder_hash
from lm_eval_tasks.tasks.arith.utils import TEST_FILE
from vllm_thinkfast.bench.environment import git_commit, versions
from vllm_thinkfast.bench.store import write_atomically

MAX_TOKENS = 128


def identity(model: Path) -> str:
    """Changes with sources, problems, model and packages; uncommitted changes have no commit.

    Args:
        model: folder.
    """
    parts = [
        code_hash(),
        file_hash(Path(__file__), TEST_FILE),
        folder_hash(model),
        versions("lm_eval"),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def make_lm_eval_keep_its_engine() -> list[Any]:
    """The list that the ``vllm.LLM`` of lm-eval will be in."""
    from lm_eval.models import vllm_causallms

    engines: list[Any] = []
    make = vllm_causallms.LLM

    def keep(*args: Any, **options: Any) -> Any:
        engines.append(make(*args, **options))
        return engines[-1]

    vllm_causallms.LLM = keep
    return engines


def mixers(llm: Any) -> list[Any]:
    """The recurrent layers of an engine in this process, in order."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer for layer in layers.values() if hasattr(layer, "scan_op")]


def problems(number: int) -> list[dict[str, str]]:
    """The first problems of the test split."""
    lines = TEST_FILE.read_text(encoding="utf-8").splitlines()[:number]
    return [json.loads(line) for line in lines]


def continue_greedily(llm: Any, number: int) -> list[list[int]]:
    """Tokens of the answers."""
    from vllm import SamplingParams

    messages = [[{"role": "user", "content": p["question"]}] for p in problems(number)]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.chat(messages, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class Recorder:
    """Stands in for a mixer's operator and keeps what its prefill gets."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.decode = operator.decode
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def prefill(self, x: Any, log_decay: Any, B: Any, C: Any, *rest: Any) -> Any:
        """The operator's own result."""
        per_group = x.shape[1] // B.shape[1]
        heads = (t.float().repeat_interleave(per_group, dim=1) for t in (B, C))
        kept = (x.float().clone(), log_decay.float().clone(), *heads)
        # Thousands of tokens of all layers: not in the device's memory.
        self.calls.append(tuple(tensor.cpu() for tensor in kept))
        return self.operator.prefill(x, log_decay, B, C, *rest)


def record_inputs(llm: Any, num_tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of the recurrences for problems with their solutions, one after another.

    Returns:
        x, log_decay, B and C as in ``state_drift.Inputs``, B and C repeated for the heads.
    """
    from vllm import SamplingParams

    recorders = []
    for mixer in mixers(llm):
        mixer.scan_op = Recorder(mixer.scan_op)
        recorders.append(mixer.scan_op)
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(temperature=0, max_tokens=1)
    for problem in problems(10**6):
        if sum(len(call[0]) for call in recorders[0].calls) >= num_tokens:
            break
        turns = [
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "content": problem["answer"]},
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        # What comes from the prefix cache is not computed, so not recorded.
        if not llm.reset_prefix_cache():
            raise ValueError("the prefix cache was not emptied, though no request runs")
        # One at a time, so that the tokens stay in order.
        llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    found = {}
    for i, name in enumerate(("x", "log_decay", "B", "C")):
        layers = [torch.cat([call[i] for call in r.calls])[:num_tokens] for r in recorders]
        found[name] = torch.stack(layers, dim=1)
    if len(found["x"]) < num_tokens:
        raise ValueError(f"the test problems have {len(found['x'])} tokens, not {num_tokens}")
    return found


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    model, store, number, samples, out, *inputs = arguments
    # On machines with AVX512-BF16 vLLM 0.32 may set the state back to float32.
    torch.cpu._is_avx512_bf16_supported = lambda: False
    import lm_eval

    engines = make_lm_eval_keep_its_engine()
    options = {
        "pretrained": model,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 256,
        "mamba_ssm_cache_dtype": "auto" if store == "int8" else store,
    }
    made_from = identity(Path(model))  # before anything is loaded that may change meanwhile
    start = time.perf_counter()
    results = lm_eval.simple_evaluate(
        model="vllm",
        model_args=options,
        tasks=["arith_passk"],
        limit=int(number),
        gen_kwargs="seed=-1",
        metadata={"num_samples": int(samples)},
        log_samples=False,
    )
    sampled_s = time.perf_counter() - start
    (llm,) = engines
    used = {str(mixer.kv_cache[1].dtype).removeprefix("torch.") for mixer in mixers(llm)}
    if used != {store}:
        print(f"error: the states are {used}, not {store}", file=sys.stderr)
        return 1
    metrics = results["results"]["arith_passk"]
    found = {
        "git_commit": git_commit(),
        "identity": made_from,
        "model": model,
        "store": store,
        "bytes_per_state": sum(s[0].nbytes for m in mixers(llm) for s in m.kv_cache[1:]),
        "pass@1": metrics["pass@1,all"],
        "pass@1_stderr": metrics["pass@1_stderr,all"],
        "sampled_s": sampled_s,
        "greedy": continue_greedily(llm, int(number)),
    }
    if inputs:
        part = Path(f"{inputs[0]}.part")
        torch.save(record_inputs(llm, 16384), part)
        part.replace(inputs[0])  # whole or not there, whenever this is killed
    write_atomically(Path(out), json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
