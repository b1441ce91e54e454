"""The problems of a task: prompts, gold answers and sampling defaults, from the task itself.

Nothing about a benchmark is written here. The lm-eval task object, built from the YAML file in
`lm_eval_tasks.tasks`, gives the rows, the prompt with the checkpoint's chat template, the gold
answer, the names from which the seeds follow, and the sampling defaults. The store and an lm-eval
run therefore ask the model the same questions with the same seeds.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_tasks import task_path
from lm_eval_tasks.errors import stop
from lm_eval_tasks.option_words import SAMPLE, OptionWords
from lm_eval_tasks.samples import ProblemRecord

_SUFFIX = "_passk"


@dataclass(frozen=True)
class Problem:
    """One problem as it is put to the model."""

    problem_id: str
    """Its name in every run; the seeds of its samples follow from it."""
    question: str
    gold: str
    prompt: str
    """The text to tokenise; with ``messages=True`` the chat messages as JSON."""

    def record(self) -> ProblemRecord:
        """Return the line of ``problems.jsonl``."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()
        return ProblemRecord(self.problem_id, self.question, self.gold, digest)


@dataclass(frozen=True)
class TaskProblems:
    """A task's problems and what the samples' meaning depends on besides them."""

    task: str
    version: str
    data_sha256: str
    """Of all rows, however many of them are used and wherever they come from."""
    problems: tuple[Problem, ...]
    prompt: Mapping[str, Any]
    """How the prompt is made: template of the question, who applies the chat template."""
    stop: tuple[str, ...]
    """Strings that end a sample besides the model's end-of-sequence token."""
    defaults: Mapping[str, float]
    """Sampling defaults: temperature, top_p, max_tokens."""


def task_names() -> list[str]:
    """Return the names that ``--task`` accepts."""
    return sorted(file.stem.removesuffix(_SUFFIX) for file in _definitions())


def load_problems(
    task: str,
    model_args: Mapping[str, Any],
    *,
    data_file: str | None = None,
    limit: int | None = None,
    chat_template: str = "auto",
    messages: bool = False,
    words: OptionWords = SAMPLE,
) -> TaskProblems:
    """Load a task's problems with their prompts.

    Args:
        task: one of `task_names`.
        model_args: the checkpoint whose chat template makes the prompt, in lm-eval's words:
            ``pretrained``, ``tokenizer``, ``revision``, ``trust_remote_code``,
            ``chat_template_args``.
        data_file: local JSON lines in the data set's field layout, instead of the task's own.
        limit: use only the first problems.
        chat_template: "auto" applies the checkpoint's template where it has one, "off" never.
        messages: give the chat messages as JSON instead of a prompt; a server renders them.
        words: what messages to the user call the options.

    Raises:
        InputError: unknown task, unreadable data, a row without question or gold answer, two
            problems of one name.
    """
    template = "off" if messages else chat_template
    built = _build(task, dict(model_args) | {"chat_template": template}, data_file, words)
    rows = list(built.eval_docs)
    if limit is not None and limit > len(rows):
        stop(f"--limit {limit}: {task} has {len(rows)} problems")
    as_messages = {"apply_chat_template": True, "chat_template": _as_json} if messages else {}
    built.build_all_requests(limit=limit, rank=0, world_size=1, **as_messages)
    problems = [_problem(built, request) for request in built.instances]
    _check_names(task, problems)
    sampling = built.config.generation_kwargs
    applied_by = "server" if messages else built.config.metadata["chat_template_applied_by"]
    return TaskProblems(
        task=task,
        version=str(built.config.metadata["version"]),
        data_sha256=_hash_rows(rows),
        problems=tuple(problems),
        prompt={
            "doc_to_text": built.config.doc_to_text,
            "chat_template_applied_by": applied_by,
            "chat_template_args": dict(model_args.get("chat_template_args") or {}),
        },
        stop=tuple(sampling["until"]),
        defaults={
            "temperature": float(sampling["temperature"]),
            "top_p": float(sampling["top_p"]),
            "max_tokens": int(sampling["max_gen_toks"]),
        },
    )


def count_problems(task: str, data_file: str | None = None, words: OptionWords = SAMPLE) -> int:
    """Return how many problems a task has, without a model; arguments as of `load_problems`.

    Raises:
        InputError: unknown task, unreadable data.
    """
    return len(_build(task, {}, data_file, words).eval_docs)


def _build(task: str, given: Mapping[str, Any], data_file: str | None, words: OptionWords) -> Any:
    """Return the lm-eval task object."""
    definition, kind = _load_definition(task)
    metadata: dict[str, Any] = dict(definition["metadata"]) | dict(given) | {"num_samples": 1}
    if data_file is not None:
        metadata["data_file"] = data_file
    return kind({"task": definition["task"], "metadata": metadata}, words)


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise prompts as lm-eval's vLLM class does: a BOS token only where the text lacks it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: prompts, chat template included.

    Returns:
        One list of token ids for each text.
    """
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    start = None if first is None else tokenizer.decode(first)
    encoded: list[list[int]] = []
    for text in texts:
        has_start = start is not None and text.startswith(start)
        extra = {"add_special_tokens": False} if has_start else {}
        encoded.append(list(tokenizer(text, **extra).input_ids))
    return encoded


def _definitions() -> list[Any]:
    return sorted(task_path().glob(f"*/*{_SUFFIX}.yaml"))


def _load_definition(task: str) -> tuple[dict[str, Any], Any]:
    """Return the YAML file of a task as a mapping, and its class."""
    files = {file.stem.removesuffix(_SUFFIX): file for file in _definitions()}
    if task not in files:
        stop(f"--task {task}: unknown; accepted are {', '.join(sorted(files))}")
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        stop(f'{error}; sampling reads the tasks with lm-eval: pip install "lm-eval>=0.4.13,<0.5"')
    definition: dict[str, Any] = load_yaml(files[task])
    return definition, definition.pop("class")


def _problem(built: Any, request: Any) -> Problem:
    question = str(request.doc[built.QUESTION_FIELD])
    return Problem(request.problem, question, built.gold(request.doc), request.args[0])


def _check_names(task: str, problems: Sequence[Problem]) -> None:
    """Two problems of one name would share their seeds and overwrite each other's samples."""
    seen: set[str] = set()
    for problem in problems:
        if problem.problem_id in seen:
            stop(f"the data of {task} has two problems named {problem.problem_id}; rename one")
        seen.add(problem.problem_id)


def _as_json(messages: list[dict[str, str]], **kwargs: Any) -> str:
    return json.dumps(messages, ensure_ascii=False)


def _hash_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
