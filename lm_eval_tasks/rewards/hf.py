"""Reward models on transformers, on a CPU or one GPU: the reference backend.

One forward pass gives all steps of a batch of solutions. Only the positions that are read go
through the head: with a vocabulary of 128 thousand, logits at every position would take more memory
than the model.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_tasks.errors import InputError, stop, why_not_loaded
from lm_eval_tasks.rewards.backend import Backend, sigmoid
from lm_eval_tasks.rewards.hf_models import Qwen2WithTwoLabels, Qwen2WithValue
from lm_eval_tasks.rewards.protocols import Readout, ScoringInput, SingleValue, TokenPair, TwoLabels
from lm_eval_tasks.rewards.spec import RewardSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HFBackend(Backend):
    """A reward model loaded with transformers."""

    def __init__(self, spec: RewardSpec, readout: Readout) -> None:
        """Load the weights.

        Raises:
            InputError: there is no such model, it lacks weights, or dtype or device do not exist.
        """
        self.device = _device(spec)
        self.dtype = _dtype(spec, self.device)
        self.batch_tokens = spec.batch_tokens
        model = _load(spec, readout, self.dtype)
        # Too large for the device: said as anything else that keeps a model from being loaded.
        self._model = _loaded(spec, lambda: model.to(self.device).eval())
        self._log_odds = _loaded(spec, lambda: _head(self._model, readout))
        limit = getattr(self._model.config, "max_position_embeddings", None) or spec.max_tokens
        if limit is None:
            stop(f"{spec.model} does not say how long an input may be; give max_tokens=")
        self.max_tokens = min(int(limit), spec.max_tokens or int(limit))

    def score(self, inputs: Sequence[ScoringInput]) -> list[list[float]]:
        """See `Backend.score`."""
        scores: list[list[float]] = [[] for _ in inputs]
        for batch in batches(inputs, self.batch_tokens):
            try:
                rows = self._read([inputs[index] for index in batch])
            except torch.cuda.OutOfMemoryError as error:
                raise ValueError(
                    f"out of memory with batch_tokens={self.batch_tokens}; give a smaller one"
                ) from error
            for index in batch:
                count = len(inputs[index].positions)
                scores[index] = [sigmoid(value) for value in rows[:count]]
                rows = rows[count:]
        return scores

    @torch.inference_mode()
    def _read(self, inputs: Sequence[ScoringInput]) -> list[float]:
        """Return the log-odds of all steps of a batch, one input after the other."""
        longest = max(len(one.token_ids) for one in inputs)
        token_ids = torch.zeros(len(inputs), longest, dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        # Padding on the right: positions keep their numbers, and a causal model never sees it.
        for row, one in enumerate(inputs):
            token_ids[row, : len(one.token_ids)] = torch.tensor(one.token_ids)
            mask[row, : len(one.token_ids)] = 1
        hidden = self._model.base_model(
            input_ids=token_ids.to(self.device),
            attention_mask=mask.to(self.device),
            use_cache=False,
        ).last_hidden_state
        which = [row for row, one in enumerate(inputs) for _ in one.positions]
        where = [position for one in inputs for position in one.positions]
        values: list[float] = self._log_odds(hidden[which, where]).tolist()
        return values

    def facts(self) -> dict[str, Any]:
        """See `Backend.facts`."""
        facts = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "max_tokens": self.max_tokens,
        }
        if self.device.type == "cuda":
            facts["gpu"] = torch.cuda.get_device_name(self.device)
        return facts

    def close(self) -> None:
        """See `Backend.close`."""
        del self._model, self._log_odds
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def batches(inputs: Sequence[ScoringInput], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of batches of similar length, the longest first.

    Args:
        inputs: any number.
        batch_tokens: limit of rows times longest row; one input alone may exceed it.
    """
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i].token_ids), reverse=True)
    while order:
        rows = max(1, batch_tokens // max(1, len(inputs[order[0]].token_ids)))
        yield order[:rows]
        order = order[rows:]


def _device(spec: RewardSpec) -> torch.device:
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(spec.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        stop(f"device={spec.device}: {_first_line(error)}; give cpu, cuda, cuda:0, ... or auto")
    return device


def _dtype(spec: RewardSpec, device: torch.device) -> torch.dtype:
    if spec.dtype in _DTYPES:
        return _DTYPES[spec.dtype]
    if spec.dtype != "auto":
        stop(f"dtype={spec.dtype} is not known; accepted: auto, {', '.join(_DTYPES)}")
    if device.type == "cpu":
        return torch.float32
    config = _loaded(spec, lambda: AutoConfig.from_pretrained(spec.model, revision=spec.revision))
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


def _load(spec: RewardSpec, readout: Readout, dtype: torch.dtype) -> Any:
    kind: Any
    if isinstance(readout, TokenPair):
        kind = AutoModelForCausalLM
    else:
        kind = Qwen2WithTwoLabels if isinstance(readout, TwoLabels) else Qwen2WithValue
    model, report = _loaded(
        spec,
        lambda: kind.from_pretrained(
            spec.model, revision=spec.revision, dtype=dtype, output_loading_info=True
        ),
    )
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        stop(
            f"{spec.model}: weights missing or of another shape: {', '.join(wrong[:4])}"
            f"{', ...' if len(wrong) > 4 else ''}; it is not a reward model of the protocol "
            f"{spec.protocol}"
        )
    return model


def _loaded(spec: RewardSpec, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except InputError:
        raise
    except Exception as error:
        stop(f"cannot load the reward model {spec.model}: {why_not_loaded(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _head(model: Any, readout: Readout) -> Callable[[Tensor], Tensor]:
    """Return the function from (R, D) backbone outputs to (R,) log-odds."""
    if not isinstance(readout, TokenPair):
        head: Callable[[Tensor], Tensor] = model.log_odds
        return head
    assert not isinstance(readout, SingleValue)
    ids = [readout.good_id, readout.bad_id]
    layer = model.get_output_embeddings()
    weight = layer.weight[ids]
    bias = None if getattr(layer, "bias", None) is None else layer.bias[ids]

    def token_log_odds(rows: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(rows, weight, bias).float()
        return logits[:, 0] - logits[:, 1]

    _check_head(model, ids, token_log_odds)
    return token_log_odds


@torch.inference_mode()
def _check_head(model: Any, ids: list[int], log_odds: Callable[[Tensor], Tensor]) -> None:
    """Refuse a model that does more to its logits than its output matrix, on one short input."""
    token_ids = torch.tensor([ids * 2], device=model.device)
    hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
    logits = model(input_ids=token_ids, use_cache=False).logits[0, :, ids].float()
    expected = logits[:, 0] - logits[:, 1]
    tolerance = 0.02 * float(logits.abs().max())  # covers bfloat16, not another scale
    has_cap = getattr(model.config, "final_logit_softcapping", None) is not None
    if has_cap or float((log_odds(hidden[0]) - expected).abs().max()) > tolerance:
        stop(
            f"{type(model).__name__} changes its logits after the output matrix (soft cap or "
            "scale), which backend=hf does not; take backend=vllm"
        )
