"""Run folders of a simulated server: known speeds, lengths and answers."""

import random
from pathlib import Path

from lm_eval_tasks.jsonl import JsonLines
from lm_eval_tasks.samples import ProblemRecord, SampleRecord, SampleStore
from lm_eval_tasks.scoring import grading_of
from lm_eval_tasks.verdicts import CLASSES, VERDICTS

TASK, TASK_VERSION = "arith", "1"


def make_run(
    folder: Path,
    *,
    num_problems=12,
    num_samples=8,
    tokens_per_s=100.0,
    skill=0.5,
    slots=8,
    regime="saturated",
    seed=0,
    reward=None,
    reward_hash="r",
    slowness=(1.0,),
    sessions=(),
    seed_of_run=1234,
    **config,
) -> Path:
    """Write a scored run folder.

    A sequence makes ``tokens_per_s / sqrt(running)`` tokens per second while ``slots`` or fewer
    are running; right answers are shorter. ``skill`` is the mean chance of a right answer. Each of
    ``slowness`` is a round, in which everything takes that many times as long; ``sessions`` adds
    facts to the sessions of the rounds.
    """
    chance = random.Random(seed)
    names = [f"p{i}" for i in range(num_problems)]
    skills = {name: min(0.97, max(0.02, chance.gauss(skill, 0.3))) for name in names}
    settings = {
        "name": folder.name,
        "model": folder.name,
        "model_id": f"files:{folder.name}",
        "task": TASK,
        "task_version": TASK_VERSION,
        "data_sha256": "0" * 64,
        "prompt": {"doc_to_text": "{{question}}"},
        "temperature": 0.8,
        "top_p": 1.0,
        "max_tokens": 200,
        "seed": seed_of_run,
        "regime": regime,
        "engine": {"backend": "vllm", "max_in_flight": None, "max_num_seqs": slots},
        "num_samples": num_samples,
        "limit": None,
        "versions": {"vllm": "0.32.0"},
        "hardware": {"machine": "x86_64", "processor": "simulated"},
        "git_commit": "unknown",
        "command": f"thinkfast-eval sample --model {folder.name}",
    } | config
    problems = [ProblemRecord(name, f"question {name}", "7", "0" * 64) for name in names]
    order = [(name, index) for index in range(num_samples) for name in names]
    if regime == "latency":
        order.sort(key=lambda pair: names.index(pair[0]))
    drawn = []
    for name, index in order:
        is_right = chance.random() < skills[name]
        answer = "7" if is_right else chance.choice(["3", "4", None])
        length = round(chance.lognormvariate(3.6 if is_right else 4.0, 0.5))
        drawn.append((name, index, answer, max(2, min(200, length))))
    store = SampleStore(folder)
    version = grading_of(TASK).version_of(TASK_VERSION)
    with store.open(settings, problems):
        rows = []
        rounds = len(slowness)
        for number, slow in enumerate(slowness):
            part, speed = slice_of(drawn, number, rounds), tokens_per_s / slow
            target = slice_of(drawn, 0, rounds, upto=number)
            row = {"session": number, "startup_s": 20.0, "warmup_s": 2.0}
            row |= {"command": settings["command"], "limit": len({one[0] for one in target})}
            row |= {"num_samples": len({one[1] for one in target})}
            store.append_session(row | (sessions[number] if number < len(sessions) else {}))
            if regime == "latency":
                now = 0.0
                for i in range(0, len(part), num_samples):
                    timed = simulate(part[i : i + num_samples], slots, speed, now)
                    now = timed[-1][-1]
                    rows += [(number, *one) for one in timed]
            else:
                rows += [(number, *one) for one in simulate(part, slots, speed, 0.0)]
        for session, (name, index, answer, length), submit, first, finish in rows:
            store.append(
                SampleRecord(
                    problem_id=name,
                    sample_index=index,
                    seed=None if seed_of_run is None else index,
                    text=f"sample {index}: {answer}",
                    num_tokens=length,
                    num_prompt_tokens=50,
                    num_cached_tokens=32 if index else 0,
                    finish_reason="length" if length == 200 else "stop",
                    session=session,
                    submit_s=submit,
                    first_token_s=first,
                    finish_s=finish,
                    config_hash=store.config_hash,
                )
            )
        for number in range(rounds):
            store.append_session({"session": number, "num_preemptions": 0, "mean_running": 5.0})
    with JsonLines(folder / VERDICTS) as lines:
        for name, index, answer, _ in drawn:
            lines.append(
                {
                    "problem_id": name,
                    "sample_index": index,
                    "answer": answer,
                    "source": "last_number" if answer else None,
                    "correct": answer == "7",
                    "task_version": version,
                }
            )
    with JsonLines(folder / CLASSES) as lines:
        for name in names:
            groups = [["7"], ["3"], ["4"]]
            lines.append({"problem_id": name, "task_version": version, "classes": groups})
    if reward is not None:
        (folder / "scores").mkdir()
        with JsonLines(folder / "scores" / f"{reward}.jsonl") as lines:
            for name, index, answer, _ in drawn:
                score = min(1.0, max(0.0, chance.gauss(0.7 if answer == "7" else 0.4, 0.2)))
                lines.append(
                    {
                        "problem_id": name,
                        "sample_index": index,
                        "step_scores": [score],
                        "seconds": 0.02,
                        "reward_hash": reward_hash,
                        "unscored": None,
                    }
                )
    return folder


def slice_of(drawn, number, rounds, upto=None):
    """Return the samples of a round, or of those up to another."""
    last = number if upto is None else upto
    return drawn[len(drawn) * number // rounds : len(drawn) * (last + 1) // rounds]


def simulate(drawn, slots, tokens_per_s, now):
    """Return (sample, submit, first token, finish), in the order of finishing."""
    waiting, running, rows = list(drawn), [], []
    submitted = now
    while waiting or running:
        while waiting and len(running) < slots:
            running.append([waiting.pop(0), now, None, None])
            running[-1][2] = float(running[-1][0][3])  # tokens still to come
        speed = tokens_per_s / len(running) ** 0.5
        step = min(entry[2] for entry in running) / speed
        for entry in running:
            if entry[3] is None:
                entry[3] = now + min(step, 0.5 / speed)
            entry[2] -= step * speed
        now += step
        for entry in [entry for entry in running if entry[2] <= 1e-9]:
            running.remove(entry)
            rows.append((entry[0], submitted, entry[3], now))
    return rows
