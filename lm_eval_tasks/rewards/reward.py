"""A reward model: a protocol and a step split on a backend."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval_tasks.errors import InputError, stop, why_not_loaded
from lm_eval_tasks.rewards.backend import Backend
from lm_eval_tasks.rewards.protocols import PROTOCOLS, Readout, ScoringInput, StepProtocol
from lm_eval_tasks.rewards.scores import Unscored
from lm_eval_tasks.rewards.spec import RewardSpec, parse_spec
from lm_eval_tasks.rewards.steps import split_steps


class Scored(NamedTuple):
    """The scores of one solution."""

    step_scores: list[float]
    """A probability per step; empty where ``unscored`` says why."""
    num_tokens: int
    """Length of the model's input; 0 for a solution without steps."""
    unscored: Unscored | None


class Reward:
    """A loaded process reward model."""

    def __init__(self, spec: RewardSpec, protocol: StepProtocol, backend: Backend) -> None:
        """See `get_reward`, which makes one.

        Args:
            spec: what was asked for.
            protocol: bound to the model's tokenizer.
            backend: loaded, for the protocol's readout.
        """
        self.spec = spec
        self.name = spec.name
        self.protocol = protocol
        self.backend = backend

    def score_batch(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Return the step scores of each solution.

        Args:
            solutions: question and steps of each.

        Returns:
            A probability per step; an empty list for a solution that has no steps or is too long
            for the model. `score_texts` says which.
        """
        return [scored.step_scores for scored in self._score(solutions)]

    def score_texts(self, samples: Sequence[tuple[str, str]]) -> list[Scored]:
        """Split and score sampled texts.

        Args:
            samples: question and sampled text of each.

        Raises:
            InputError: the model or the server cannot go on, or a text cannot be encoded.
        """
        return self._score(
            [(question, split_steps(text, self.spec.split)) for question, text in samples]
        )

    def _score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[Scored]:
        results = [Scored([], 0, "empty") for _ in solutions]
        inputs: dict[int, ScoringInput] = {}
        for index, (question, steps) in enumerate(solutions):
            if not steps:
                continue
            try:
                one = self.protocol.encode(_encodable(question), [_encodable(s) for s in steps])
            except InputError:
                raise
            except ValueError as error:
                stop(f"{error} (in the solution {steps[0][:60]!r}...)")
            if len(one.token_ids) > self.backend.max_tokens:
                results[index] = Scored([], len(one.token_ids), "too_long")
            else:
                inputs[index] = one
        try:
            scores = self.backend.score(list(inputs.values()))
        except InputError:
            raise
        except ValueError as error:
            stop(f"{self.spec.model}: {error}")
        for (index, one), found in zip(inputs.items(), scores, strict=True):
            assert len(found) == len(one.positions), "one score per step"
            results[index] = Scored(found, len(one.token_ids), None)
        return results

    def facts(self) -> dict[str, Any]:
        """Return the reward's description for the file beside its scores."""
        return {
            "name": self.name,
            "reward_hash": self.spec.hash(),
            **self.spec.identity(),
            "model": self.spec.model,
            "resolved": self.backend.facts(),
        }

    def close(self) -> None:
        """Free the model."""
        self.backend.close()


def _encodable(text: str) -> str:
    """Replace lone surrogates, which a damaged file can contain and no tokenizer accepts."""
    return text.encode("utf-8", "replace").decode("utf-8")


def get_reward(spec: RewardSpec | str) -> Reward:
    """Load a reward model.

    Args:
        spec: see `parse_spec`.

    Raises:
        InputError: the string is wrong, the tokenizer does not fit the protocol, or the model
            cannot be loaded.
    """
    if isinstance(spec, str):
        spec = parse_spec(spec)
    try:
        protocol = PROTOCOLS[spec.protocol](_tokenizer(spec))
    except InputError:
        raise
    except ValueError as error:
        stop(f"{spec.tokenizer_source}: {error}")
    return Reward(spec, protocol, _backend(spec, protocol.readout))


def _tokenizer(spec: RewardSpec) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        stop(f"{error}; reward models need transformers: pip install transformers")
    try:
        # A revision is one of the model's repository.
        revision = spec.revision if spec.tokenizer is None else None
        return AutoTokenizer.from_pretrained(spec.tokenizer_source, revision=revision)
    except Exception as error:  # a damaged file: of any class
        reason = why_not_loaded(error)
        stop(
            f"cannot load the tokenizer of the reward model {spec.tokenizer_source}: {reason}; "
            "check the name, or give tokenizer="
        )


def _backend(spec: RewardSpec, readout: Readout) -> Backend:
    if spec.backend == "remote":
        from lm_eval_tasks.rewards.remote import RemoteBackend

        return RemoteBackend(spec, readout)
    if spec.backend == "vllm":
        from lm_eval_tasks.rewards.vllm_engine import VLLMBackend

        return VLLMBackend(spec, readout)
    try:
        from lm_eval_tasks.rewards.hf import HFBackend
    except ImportError as error:
        stop(f"{error}; backend=hf needs torch and transformers: pip install torch transformers")
    return HFBackend(spec, readout)
