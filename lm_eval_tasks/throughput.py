"""Generation speed of one model at several batch sizes: ``throughput.jsonl`` of a run folder.

A batch of b sequences with prompts of one length generates a fixed number of tokens each, whatever
it says, and nothing else runs. The prefix cache is emptied first, so the prefill is paid. The
engine is the one that drew the samples before (``thinkfast-eval sample --batch-sizes``) and is
warmed up at every batch size; that is not timed. The sequences have no seeds: vLLM draws seeded
ones row by row, which would bring the speeds of all models closer together.
"""

import random
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lm_eval_tasks.errors import stop
from lm_eval_tasks.jsonl import JsonLines, read_object
from lm_eval_tasks.sampling.backend import BackendError
from lm_eval_tasks.sampling.vllm_backend import empty_prefix_cache, failures_of_vllm

THROUGHPUT = "throughput.jsonl"
_WARM_UP_TOKENS = 2
_FIELDS = {
    "round": int,
    "batch_size": int,
    "num_prompt_tokens": int,
    "num_tokens": int,
    "seconds": float,
    "prefill_s": float,
    "tokens_per_s": float,
    "decode_tokens_per_s": float,
    "num_preemptions": int,
    "seeded": bool,
    "config_hash": str,
    "started": str,
}


def read_throughput(folder: Path) -> list[dict[str, Any]]:
    """Return the measurements of a run folder; empty where there are none.

    Those of settings other than the folder's are left out: they stayed from a run whose samples
    are gone.

    Raises:
        InputError: a line is malformed, one round and batch size stands there twice, or sequences
            have different lengths: their speeds cannot be compared.
    """
    seen: set[tuple[int, int]] = set()
    lengths: set[tuple[int, int]] = set()
    config = folder / "config.json"
    present = read_object(config).get("config_hash") if config.is_file() else None

    def is_ours(row: dict[str, Any]) -> bool:
        return present in (None, row["config_hash"])

    def parse(row: dict[str, Any]) -> dict[str, Any]:
        if row.keys() | {"seeded"} != _FIELDS.keys():
            raise ValueError(f"fields are {sorted(row)}; need {sorted(_FIELDS)}")
        row = {"seeded": True} | row  # earlier versions gave each sequence a seed
        for field, kind in _FIELDS.items():
            accepted = (int, float) if kind is float else (kind,)
            if not isinstance(row[field], accepted) or isinstance(row[field], bool) != (
                kind is bool
            ):
                raise ValueError(f"{field} is {row[field]!r}; need {kind.__name__}")
        if not is_ours(row):
            return row
        key = (row["round"], row["batch_size"])
        if key in seen:
            raise ValueError(f"round {key[0]} at batch size {key[1]} stands there twice")
        seen.add(key)
        lengths.add(_lengths(row))
        if len(lengths) > 1:
            raise ValueError(f"speeds of different lengths in one file: {sorted(lengths)} tokens")
        return row

    rows = list(JsonLines(folder / THROUGHPUT).read(parse))
    ours = list(filter(is_ours, rows))
    if len(ours) < len(rows):
        sys.stderr.write(
            f"{folder / THROUGHPUT}: {len(rows) - len(ours)} of {len(rows)} speeds are of other "
            "settings than config.json and left out\n"
        )
    return ours


def time_batch(backend: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, Any]:
    """Time one batch in a `lm_eval_tasks.sampling.vllm_backend.VllmBackend`.

    Args:
        backend: idle.
        prompts: token ids of each sequence.
        num_tokens: generated for each sequence.

    Returns:
        ``seconds`` from the first submission to the last token, ``prefill_s`` until every sequence
        has its first token, ``tokens_per_s`` over all, ``decode_tokens_per_s`` after the prefill.

    Raises:
        BackendError: the engine broke down.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = backend.engine
    empty_prefix_cache(engine)
    rendered = engine.renderer.render_cmpl([{"prompt_token_ids": list(ids)} for ids in prompts])
    preempted = backend.tap.num_preemptions
    started = time.monotonic()
    for number, prompt in enumerate(rendered):
        params = SamplingParams(
            max_tokens=num_tokens,
            ignore_eos=True,
            temperature=1.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        with failures_of_vllm():
            engine.add_request(f"throughput-{number}", prompt, params)
    counts: list[tuple[float, int]] = []
    last_first = started
    while engine.has_unfinished_requests():
        with failures_of_vllm():
            outputs = engine.step()
        new = sum(len(output.outputs[0].token_ids) for output in outputs)
        counts.append((time.monotonic(), new))
        first = [output.metrics.first_token_ts for output in outputs if output.metrics is not None]
        last_first = max([last_first, *first])
    ended = counts[-1][0]
    generated = sum(new for _, new in counts)
    assert generated == len(prompts) * num_tokens, (generated, len(prompts), num_tokens)
    # Decoding is what happens once every sequence has its first token. The step that made the last
    # of them returns a moment after the engine stamped it.
    prefilled = next(at for at, _ in counts if at >= last_first)
    decoded = sum(new for at, new in counts if at > prefilled)
    return {
        "seconds": ended - started,
        "prefill_s": prefilled - started,
        "tokens_per_s": generated / (ended - started),
        "decode_tokens_per_s": decoded / (ended - prefilled) if decoded else 0.0,
        "num_preemptions": backend.tap.num_preemptions - preempted,
    }


def _lengths(row: dict[str, Any]) -> tuple[int, int]:
    return row["num_prompt_tokens"], row["num_tokens"]


def missing_batch_sizes(
    folder: Path, batch_sizes: Sequence[int], round_number: int, lengths: tuple[int, int]
) -> list[int]:
    """Return the batch sizes that a round lacks, each once, in ascending order.

    Args:
        folder: the run folder.
        batch_sizes: those that are wanted.
        round_number: of the comparison.
        lengths: prompt and new tokens of every sequence.

    Raises:
        InputError: the folder has speeds of other lengths; or see `read_throughput`.
    """
    rows = read_throughput(folder)
    if batch_sizes and rows and _lengths(rows[0]) != lengths:
        there, now = (" ".join(map(str, pair)) for pair in (_lengths(rows[0]), lengths))
        stop(
            f"--speed-tokens {now}: {folder} has speeds of --speed-tokens {there}; give these, or "
            "another folder with --out"
        )
    done = {row["batch_size"] for row in rows if row["round"] == round_number}
    return sorted(set(batch_sizes) - done)


def check_fits(
    backend: Any, batch_sizes: Sequence[int], num_prompt_tokens: int, num_tokens: int
) -> None:
    """Refuse a measurement that the engine cannot run as asked, before anything is drawn.

    Args:
        backend: a `lm_eval_tasks.sampling.vllm_backend.VllmBackend`.
        batch_sizes: sequences at a time.
        num_prompt_tokens: of every prompt.
        num_tokens: generated for each.

    Raises:
        InputError: a batch does not fit the engine's limits.
    """
    longest = backend.engine.model_config.max_model_len
    if num_prompt_tokens + num_tokens > longest:
        stop(
            f"{num_prompt_tokens} + {num_tokens} tokens of the speed measurement exceed the "
            f"model's length {longest}; give fewer with --speed-tokens"
        )
    if max(batch_sizes) > backend.max_num_seqs:
        stop(
            f"--batch-sizes {max(batch_sizes)}: the engine runs at most {backend.max_num_seqs} "
            "sequences at once; give fewer, or a larger max_num_seqs"
        )


def measure(
    backend: Any,
    folder: Path,
    *,
    config_hash: str,
    round_number: int,
    batch_sizes: Sequence[int],
    num_prompt_tokens: int,
    num_tokens: int,
) -> None:
    """Measure some batch sizes of a round and store each as it is done.

    Args:
        backend: a `lm_eval_tasks.sampling.vllm_backend.VllmBackend`.
        folder: the run folder.
        config_hash: of the run, to tell which settings the speeds belong to.
        round_number: of the comparison.
        batch_sizes: sequences at a time: those of `missing_batch_sizes`.
        num_prompt_tokens: of every prompt; they are random, so that no two share a prefix.
        num_tokens: generated for each.

    Raises:
        InputError: the engine broke down, or the disk is full; what was measured before is kept.
    """
    vocabulary = backend.engine.model_config.get_vocab_size()
    with JsonLines(folder / THROUGHPUT) as lines:
        for batch_size in batch_sizes:
            generator = random.Random(f"{round_number}/{batch_size}")
            prompts = [
                [generator.randrange(vocabulary) for _ in range(num_prompt_tokens)]
                for _ in range(batch_size)
            ]
            try:
                time_batch(backend, prompts, min(num_tokens, _WARM_UP_TOKENS))
                started = datetime.now(timezone.utc).isoformat(timespec="seconds")
                timed = time_batch(backend, prompts, num_tokens)
            except BackendError as error:
                stop(
                    f"{error} while the speed of {batch_size} sequences was measured; samples and "
                    "earlier measurements are stored, the same command goes on from there"
                )
            lines.append(
                {
                    "round": round_number,
                    "batch_size": batch_size,
                    "num_prompt_tokens": num_prompt_tokens,
                    "num_tokens": num_tokens,
                    "seeded": False,
                    "config_hash": config_hash,
                    "started": started,
                }
                | timed
            )
            sys.stderr.write(
                f"{folder.name}: {batch_size} sequences at once, "
                f"{timed['tokens_per_s']:.0f} tokens/s\n"
            )
