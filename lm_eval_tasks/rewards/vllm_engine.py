"""Reward models on a vLLM engine in this process.

Token protocols run on an ordinary generating engine: one request per step, its prompt ending right
before the position that is read, one greedy token, and the log-probabilities of the two tokens by
``logprob_token_ids``. Asking for the most likely tokens instead can miss one of the two. With
prefix caching the requests of a solution cost little more than one prefill, and this works on every
model runner, unlike ``prompt_logprob_token_ids``.

Two-label heads run as vLLM's own ``Qwen2ForProcessRewardModel`` with pooling task
``token_classify``, whose STEP pooler returns the softmax at each step tag.
"""

import gc
import os
from collections.abc import Sequence
from typing import Any

from lm_eval_tasks.errors import InputError, stop, why_not_loaded
from lm_eval_tasks.rewards.backend import Backend, sigmoid
from lm_eval_tasks.rewards.protocols import Readout, ScoringInput, SingleValue, TokenPair, TwoLabels
from lm_eval_tasks.rewards.spec import RewardSpec


class VLLMBackend(Backend):
    """A reward model on ``vllm.LLM``."""

    def __init__(self, spec: RewardSpec, readout: Readout) -> None:
        """Start the engine.

        Raises:
            InputError: vLLM is missing, has no class for this head, or refuses model or arguments.
        """
        if isinstance(readout, SingleValue):
            stop(
                f"{spec.protocol}: vLLM has no class for this value head; take backend=hf, or "
                "backend=remote with a server that has the authors' plugin"
            )
        # The engine in this very process: one of its own survives a kill -9 of this one for ever,
        # with all its memory. vLLM reads this when the engine starts.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
            from vllm.distributed import parallel_state
        except ImportError as error:
            stop(f"backend=vllm: {error}; install vLLM, or take backend=hf")
        arguments: dict[str, Any] = {"model": spec.model, "dtype": spec.dtype, "seed": 0}
        if spec.tokenizer is not None:
            arguments["tokenizer"] = spec.tokenizer
        if spec.revision is not None:
            arguments["revision"] = spec.revision
        if spec.max_tokens is not None:
            arguments["max_model_len"] = spec.max_tokens
        self._params = _params(readout)
        # Beside an engine that samples in this process, what they share is not ours to take down.
        self._is_alone = not parallel_state.model_parallel_is_initialized()
        try:
            self._engine: Any = vllm.LLM(**arguments | dict(spec.engine))
        except InputError:
            raise
        except Exception as error:  # too little memory, damaged weights, ...: of any class
            stop(f"vLLM cannot start the reward model {spec.model}: {why_not_loaded(error)}")
        config = self._engine.llm_engine.model_config
        self._facts = {
            "vllm": vllm.__version__,
            "dtype": str(config.dtype).removeprefix("torch."),
            "engine": dict(spec.engine),
        }
        # A generating request needs room for its one token.
        self.max_tokens = int(config.max_model_len) - isinstance(readout, TokenPair)

    def score(self, inputs: Sequence[ScoringInput]) -> list[list[float]]:
        """See `Backend.score`."""
        if not inputs:
            return []
        readout = inputs[0].readout
        try:
            if isinstance(readout, TokenPair):
                return self._score_tokens(inputs, readout)
            assert isinstance(readout, TwoLabels)
            return self._score_labels(inputs, readout)
        except ValueError:
            raise
        except Exception as error:  # vLLM's own classes differ between releases
            raise ValueError(f"vLLM gave up: {type(error).__name__}: {error}") from error

    def _score_tokens(
        self, inputs: Sequence[ScoringInput], readout: TokenPair
    ) -> list[list[float]]:
        prompts = [{"prompt_token_ids": ids} for one in inputs for ids in prefixes(one)]
        outputs = iter(self._engine.generate(prompts, self._params, use_tqdm=False))
        scores = []
        for one in inputs:
            found = [next(outputs).outputs[0].logprobs[0] for _ in one.positions]
            scores.append(
                [
                    sigmoid(pair[readout.good_id].logprob - pair[readout.bad_id].logprob)
                    for pair in found
                ]
            )
        return scores

    def _score_labels(
        self, inputs: Sequence[ScoringInput], readout: TwoLabels
    ) -> list[list[float]]:
        outputs = self._engine.encode(
            [{"prompt_token_ids": one.token_ids} for one in inputs],
            pooling_params=self._params,
            pooling_task="token_classify",
            use_tqdm=False,
        )
        return [
            label_scores(one, output.outputs.data.tolist(), readout)
            for one, output in zip(inputs, outputs, strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        """See `Backend.facts`."""
        return self._facts | {"max_tokens": self.max_tokens}

    def close(self) -> None:
        """See `Backend.close`."""
        self._engine.llm_engine.engine_core.shutdown()
        del self._engine
        if self._is_alone:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()  # the next engine in this process finds its memory free
        else:
            gc.collect()


def _params(readout: TokenPair | TwoLabels) -> Any:
    """Return vLLM's parameters of every request."""
    from vllm import PoolingParams, SamplingParams

    try:
        if isinstance(readout, TwoLabels):
            return PoolingParams(step_tag_id=readout.tag_id)
        return SamplingParams(
            max_tokens=1,
            temperature=0,
            logprob_token_ids=[readout.good_id, readout.bad_id],
            detokenize=False,
        )
    except TypeError as error:
        stop(f"this vLLM is too old for reward models ({error}); update it, or take backend=hf")


def prefixes(one: ScoringInput) -> list[list[int]]:
    """Return per step the prompt whose next token is the one that the protocol looks at."""
    return [one.token_ids[: position + 1] for position in one.positions]


def label_scores(
    one: ScoringInput, rows: Sequence[Sequence[float]], readout: TwoLabels
) -> list[float]:
    """Return the scores of the steps from what a token classifier returned for one input.

    Args:
        one: the input.
        rows: one pair of probabilities for each step tag (pooling type STEP) or for each token
            (ALL). A sampled text may contain the tag itself, so there can be more tags than steps.
        readout: has the tag's id.

    Raises:
        ValueError: the rows are neither, or no probabilities.
    """
    tags = [index for index, token in enumerate(one.token_ids) if token == readout.tag_id]
    if len(rows) == len(tags):
        chosen = [rows[tags.index(position)] for position in one.positions]
    elif len(rows) == len(one.token_ids):
        chosen = [rows[position] for position in one.positions]
    else:
        raise ValueError(
            f"it returned {len(rows)} rows for {len(tags)} step tags in "
            f"{len(one.token_ids)} tokens; serve it with pooling type STEP and step_tag_id "
            f"{readout.tag_id}, or pooling type ALL"
        )
    for row in chosen:
        if len(row) != 2 or not abs(sum(row) - 1) < 0.02 or min(row) < 0:
            raise ValueError(
                f"it returned {list(row)} for a step instead of two probabilities; "
                "serve it with activation (softmax), as vLLM does by default"
            )
    return [min(1.0, row[1]) for row in chosen]
