"""Sample our tasks through lm-eval's vLLM model class as they need it.

lm-eval 0.4 creates the model before it loads a task, has no entry point for model classes, and its
``VLLM.generate_until`` (a) submits one request at a time under the command line's default
``--batch_size 1``, (b) gives all copies of a request the same seed when a seed is set, (c) keeps
only the text. The hook leaves the class as it is for every other task. docs/design/patches.md
lists it with its reason, upstream links and the condition under which it goes.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from lm_eval.api.instance import Instance

from lm_eval_tasks.errors import stop
from lm_eval_tasks.samples import SEED_FIELDS, SampledText, run_key, sample_seed
from lm_eval_tasks.sampling.environment import model_id

logger = logging.getLogger(__name__)

_VLLM_MODULE = "lm_eval.models.vllm_causallms"


@dataclass
class SampleRequest(Instance):
    """A generation request of our tasks; lm-eval repeats the same object N times."""

    problem: str = ""
    """Name of the problem, the same in every run."""


def install_vllm_hook() -> None:
    """Wrap ``VLLM.generate_until`` once, if lm-eval's vLLM class is loaded at all."""
    module = sys.modules.get(_VLLM_MODULE)
    if module is None:
        return
    original = module.VLLM.generate_until
    if getattr(original, "is_thinkfast_hook", False):
        return

    @wraps(original)
    def generate_until(lm: Any, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return _dispatch(original, lm, requests, disable_tqdm)

    generate_until.is_thinkfast_hook = True  # type: ignore[attr-defined]
    module.VLLM.generate_until = generate_until


def _dispatch(
    original: Callable[..., list[str]], lm: Any, requests: list[Instance], disable_tqdm: bool
) -> list[str]:
    """Sample our requests here and leave the others to lm-eval; keep the order."""
    ours = [request for request in requests if isinstance(request, SampleRequest)]
    others = [request for request in requests if not isinstance(request, SampleRequest)]
    sampled = iter(sample_with_vllm(lm, ours) if ours else [])
    plain = iter(original(lm, others, disable_tqdm=disable_tqdm) if others else [])
    return [next(sampled if isinstance(r, SampleRequest) else plain) for r in requests]


def sample_with_vllm(lm: Any, requests: Sequence[SampleRequest]) -> list[SampledText]:
    """Sample all requests in one submission, each with a seed of its own.

    The run's seed is ``--gen_kwargs seed=S``, else ``--model_args seed=S`` (lm-eval: 1234). Seed -1
    leaves the samples unseeded. A prompt is never cut: where prompt and ``max_gen_toks`` exceed the
    model's length, the generation gets shorter, which shows as truncation.

    Args:
        lm: lm-eval's vLLM model.
        requests: our requests; the j-th occurrence of one object is its sample j.

    Returns:
        The sampled texts in the order of the requests.

    Raises:
        InputError: a prompt alone fills the model's length, or vLLM refuses a sampling setting.
    """
    from lm_eval.models.utils import postprocess_generated_text
    from vllm import SamplingParams

    texts = list(dict.fromkeys(request.args[0] for request in requests))
    model = model_id(lm.model_args["model"], lm.model_args.get("revision"))
    tokens = dict(zip(texts, lm.tok_encode(texts), strict=True))
    eos = lm.tokenizer.decode(lm.eot_token_id) or lm.tokenizer.eos_token
    seen: Counter[int] = Counter()
    shortened = 0
    params, stops = [], []
    for request in requests:
        text, generation = request.args
        settings, until, max_tokens = lm.modify_gen_kwargs(
            generation, eos=eos, default_max_gen_toks=lm.max_gen_toks
        )
        room = lm.max_length - len(tokens[text])
        if room < 1:
            stop(
                f"the prompt of {request.problem} has {len(tokens[text])} tokens and the model's "
                f"length is {lm.max_length}; give a larger max_model_len in --model_args"
            )
        shortened += room < max_tokens
        run_seed = settings.pop("seed", None)
        run_seed = int(lm.model_args["seed"] if run_seed is None else run_seed)
        index = seen[id(request)]
        seen[id(request)] += 1
        run = {
            "model_id": model,
            "temperature": float(settings.get("temperature", 1.0)),
            "top_p": float(settings.get("top_p", 1.0)),
            "max_tokens": int(max_tokens),
            "regime": "saturated",
            "seed_fields": SEED_FIELDS,
        }
        problem = request.problem
        seed = None if run_seed == -1 else sample_seed(run_seed, problem, index, run_key(run))
        # A thinking model's task-level stop strings apply after its thinking, as in lm-eval.
        stop_now = [s for s in until if s == eos] if lm.think_end_token else until
        settings |= {"max_tokens": min(max_tokens, room), "stop": stop_now, "seed": seed}
        try:
            params.append(SamplingParams(**settings))
        except (TypeError, ValueError) as error:
            stop(f"vLLM refuses the sampling settings {generation}: {error}; see --gen_kwargs")
        stops.append(until)
    if shortened:
        logger.warning(
            "%d of %d samples get fewer than max_gen_toks tokens: prompt and generation together "
            "exceed the model's length %d; texts cut there count as truncated",
            shortened,
            len(requests),
            lm.max_length,
        )
    prompts = [tokens[request.args[0]] for request in requests]
    outputs = _generate(lm, prompts, params)
    return [
        SampledText(
            postprocess_generated_text(output.outputs[0].text, until, lm.think_end_token),
            num_tokens=len(output.outputs[0].token_ids),
            finish_reason=output.outputs[0].finish_reason,
        )
        for output, until in zip(outputs, stops, strict=True)
    ]


def _generate(lm: Any, prompts: list[list[int]], params: list[Any]) -> list[Any]:
    """Submit everything at once, with vLLM's progress bar, over all data-parallel replicas."""
    batch_size = lm.batch_size
    lm.batch_size = "auto"  # what lm-eval calls a batch of everything; it also shows progress
    try:
        outputs: list[Any] = lm._model_generate(
            requests=prompts, generate=True, sampling_params=params
        )
    finally:
        lm.batch_size = batch_size
    return outputs
