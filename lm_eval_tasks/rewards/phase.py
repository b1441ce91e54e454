"""Score the samples of a run folder, batch by batch, and go on after a kill.

A batch's lines are written as soon as the batch is done, so ``kill -9`` costs one batch. Which
samples make a batch depends on the run alone, neither on the order in which they finished nor on
kills: a score's last digits depend on its batch, and so an interrupted run has the same scores. The
scores of another model, protocol or step split under the same name are refused, not mixed.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lm_eval_tasks.errors import stop
from lm_eval_tasks.jsonl import JsonLines, read_object, write_atomically
from lm_eval_tasks.locks import exclusive
from lm_eval_tasks.rewards.reward import Reward
from lm_eval_tasks.rewards.scores import ScoreRecord, read_scores, score_path
from lm_eval_tasks.rewards.spec import RewardSpec
from lm_eval_tasks.samples import SampleRecord, SampleStore
from lm_eval_tasks.sampling.progress import Progress

#: A sample's key, and its place in samples.jsonl.
_Placed = tuple[tuple[str, int], int]


@dataclass
class PhaseCounts:
    """What a score file holds."""

    num_samples: int = 0
    """Samples in the run."""
    num_scored: int = 0
    """Samples in the score file, those without a score included."""
    num_new: int = 0
    """Of these, written by this session."""
    num_empty: int = 0
    """Texts without a step."""
    num_too_long: int = 0
    """Solutions longer than the reward model takes."""
    num_steps: int = 0
    seconds: float = 0.0
    """The reward model's time on all of them, without loading and warm-up."""

    @property
    def steps_per_solution(self) -> float:
        """Mean over the solutions that have a score; 0 without any."""
        solutions = self.num_scored - self.num_empty - self.num_too_long
        return self.num_steps / solutions if solutions else 0.0

    def add(self, record: ScoreRecord) -> None:
        """Count one line."""
        self.num_scored += 1
        self.num_empty += record.unscored == "empty"
        self.num_too_long += record.unscored == "too_long"
        self.num_steps += len(record.step_scores)
        self.seconds += record.seconds


class ScorePhase:
    """The scoring of one run by one reward model."""

    def __init__(self, folder: Path, spec: RewardSpec) -> None:
        """See the class.

        Args:
            folder: the run folder.
            spec: of the reward model, which need not be loaded.
        """
        self.folder = folder
        self.spec = spec
        self.reward_hash = spec.hash()
        self.store = SampleStore(folder)
        self.path = score_path(folder, spec.name)
        self.description = self.path.with_suffix(".json")

    def counts(self) -> PhaseCounts:
        """Return what is there, and check that it belongs to this reward and this run.

        Raises:
            InputError: no run folder, a damaged file, or scores of another reward or run.
        """
        return self._check()[0]

    def run(
        self, reward: Reward, batch_size: int, session: Mapping[str, Any], stream: TextIO
    ) -> PhaseCounts:
        """Score what is missing.

        Args:
            reward: loaded, of the spec given before.
            batch_size: samples scored and written at a time.
            session: facts about this start: command, versions, hardware.
            stream: where the progress line goes.

        Returns:
            What the file holds at the end.

        Raises:
            InputError: as for `counts`; or the model or the server gave up, or the disk is full:
                every batch that was finished before is kept.
        """
        lock = self.path.with_suffix(".lock")
        with exclusive(lock, self.path), JsonLines(self.path) as lines:
            counts, done = self._check()
            questions = {p.problem_id: p.question for p in self.store.problems()}
            warmup_s = _warm_up(reward)
            self._describe(reward, dict(session) | {"warmup_s": warmup_s, "done": len(done)})
            progress = Progress(counts.num_samples, counts.num_scored, stream)
            progress.start()
            for batch in _batches(self._in_order(list(questions)), batch_size):
                if all(key in done for key, _ in batch):
                    continue
                samples = list(self.store.records_at(place for _, place in batch))
                for record, num_tokens in self._score(reward, samples, questions):
                    if record.key in done:
                        continue  # of a batch that a kill cut
                    lines.append(record.as_dict())
                    counts.add(record)
                    counts.num_new += 1
                    progress.add(num_tokens)
                progress.show()
            progress.end()
        return counts

    def _in_order(self, problem_ids: Sequence[str]) -> list[_Placed]:
        """Return where the samples stand, first sample 0 of every problem: more come behind these.

        Their texts, which may be larger than the memory, are read batch by batch.
        """
        number = {name: i for i, name in enumerate(problem_ids)}
        placed = [(record.key, place) for place, record in self.store.placed_records()]
        return sorted(placed, key=lambda one: (one[0][1], number[one[0][0]]))

    def _score(
        self, reward: Reward, batch: Sequence[SampleRecord], questions: Mapping[str, str]
    ) -> Iterator[tuple[ScoreRecord, int]]:
        started = time.perf_counter()
        found = reward.score_texts([(questions[one.problem_id], one.text) for one in batch])
        seconds = time.perf_counter() - started
        read = [one.num_tokens if one.unscored is None else 0 for one in found]
        total = sum(read) or 1
        for sample, scored, num_tokens in zip(batch, found, read, strict=True):
            record = ScoreRecord(
                problem_id=sample.problem_id,
                sample_index=sample.sample_index,
                step_scores=[round(score, 9) for score in scored.step_scores],
                seconds=round(seconds * num_tokens / total, 6),
                reward_hash=self.reward_hash,
                unscored=scored.unscored,
                num_tokens=num_tokens,
            )
            yield record, num_tokens

    def _check(self) -> tuple[PhaseCounts, set[tuple[str, int]]]:
        """Return the counts and the keys of the scored samples."""
        if not (self.folder / "config.json").is_file():
            stop(
                f"{self.folder} is no run folder (no config.json); give one that "
                "thinkfast-eval sample wrote"
            )
        have = self.store.have()
        counts = PhaseCounts(num_samples=sum(map(len, have.values())))
        done: set[tuple[str, int]] = set()
        if self.path.exists():
            for record in read_scores(self.folder, self.spec.name):
                if record.reward_hash != self.reward_hash:
                    self._refuse_other(record.reward_hash)
                if record.sample_index not in have.get(record.problem_id, ()):
                    stop(
                        f"{self.path} scores sample {record.sample_index} of {record.problem_id}, "
                        "which is not in samples.jsonl; draw that sample again with thinkfast-eval "
                        "sample, or move this file away if it belongs to another run"
                    )
                counts.add(record)
                done.add(record.key)
        return counts, done

    def _refuse_other(self, stored_hash: str) -> None:
        differences = ""
        if self.description.is_file():
            stored = read_object(self.description).get("reward", {})
            now = self.spec.identity()
            now.setdefault("engine", None)
            differences = "".join(
                f"; {key} {stored.get(key)!r} there, {value!r} now"
                for key, value in now.items()
                if stored.get(key) != value
            )
        stop(
            f"{self.path} holds scores of another reward ({stored_hash}, now {self.reward_hash}"
            f"{differences}); give this one another name with name=, or move the file away"
        )

    def _describe(self, reward: Reward, session: Mapping[str, Any]) -> None:
        """Write which reward made the scores, and add this session to those before."""
        facts = reward.facts()
        sessions = []
        if session["done"] and self.description.is_file():
            stored = read_object(self.description)
            sessions = stored.get("sessions", [])
            before = stored.get("reward", {}).get("resolved", {}).get("dtype")
            now = facts["resolved"].get("dtype")
            if before != now:
                stop(
                    f"{self.path} was computed in {before}, this machine would go on in {now}; "
                    f"give dtype={before} and the same name=, or this one another name"
                )
        found = {"reward": facts, "sessions": [*sessions, dict(session)]}
        write_atomically(self.description, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _warm_up(reward: Reward) -> float:
    """Score one line, so that no sample pays for the first pass; return the seconds it took."""
    started = time.perf_counter()
    reward.score_batch([("What is 1 + 1?", ["1 + 1 = 2"])])
    return round(time.perf_counter() - started, 3)


def _batches(placed: Sequence[_Placed], size: int) -> Iterator[Sequence[_Placed]]:
    for start in range(0, len(placed), size):
        yield placed[start : start + size]
