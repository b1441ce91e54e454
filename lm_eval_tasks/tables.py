"""The tables of a report, and its numbers as CSV, from the analysed groups alone."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_tasks.figures import METHOD_LABELS, Figure

_REGIMES = {
    "saturated": "saturated: all problems share the server; seconds are server seconds per problem",
    "latency": "latency: one problem at a time owns the server; seconds since its submission",
}
_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Table:
    """A table with its heading."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return it in Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        return f"{text}\n\n{self.note}\n" if self.note else f"{text}\n"


def regime_text(group: dict[str, Any]) -> str:
    """Return what seconds mean in this group."""
    text = _REGIMES[group["regime"]]
    return f"{text}; {group['k']} samples in flight" if group["k"] else text


def tables_of(group: dict[str, Any], level: float) -> list[Table]:
    """Return the tables of a group.

    Args:
        group: of `lm_eval_tasks.analysis.analyse`.
        level: of the intervals.
    """
    found = [_doubts(group), _metrics(group, level), *_targets(group, level)]
    found += [_areas(group, level), *_best(group), _throughput(group), _limits(group)]
    found.append(_differences(group))
    return [table for table in found if table.rows]


def _percent(value: float | None, digits: int = 1) -> str:
    return "unknown" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None, form: str = ".4g") -> str:
    return "unknown" if value is None else format(value, form)


def _share_range(interval: dict[str, float]) -> str:
    value, low, high = (f"{100 * interval[end]:.1f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _doubts(group: dict[str, Any]) -> Table:
    """What a reader needs to doubt the comparison."""
    rows: list[tuple[str, str, Any]] = [
        ("problems", "num_problems", str),
        ("samples", "num_samples", str),
        ("samples per problem", "", None),
        ("different texts", "distinct_texts", _percent),
        ("cut at the token limit", "truncated", _percent),
        ("no answer found", "no_answer", _percent),
        ("generated tokens per sample", "tokens_per_sample", _number),
        ("prompt tokens per sample", "prompt_tokens_per_sample", _number),
        ("prompt tokens from the prefix cache", "prefix_cache_hits", _percent),
        ("effective batch size", "effective_batch_size", _number),
        ("generated tokens per second", "tokens_per_s", _number),
        ("server seconds per sample", "server_s_per_sample", _number),
        ("busy server seconds", "busy_s", _number),
        ("share of them in which the batch only emptied", "drain_share", _percent),
        ("preemptions", "preemptions", _number),
        ("sessions", "num_sessions", str),
        ("start-up and warm-up, excluded [s]", "", None),
    ]
    facts = [run["facts"] for run in group["runs"]]
    if any("reward_s_per_sample" in fact for fact in facts):
        rows.append(("reward model seconds per sample", "reward_s_per_sample", _number))
    is_pooled = any(fact.get("measured_reward_s_per_sample") is not None for fact in facts)
    if is_pooled:
        rows.append(("the same as measured", "measured_reward_s_per_sample", _number))
    if any(fact["resumed_problems"] for fact in facts) and group["regime"] == "latency":
        rows.append(("problems drawn at more than one load", "resumed_problems", str))
    if all("seed" in fact for fact in facts):
        rows.insert(3, ("seed of the samples", "seed", _seed))
    cells = []
    for title, key, form in rows:
        if key:
            cells.append([title, *(form(fact[key]) for fact in facts)])
        elif title.startswith("samples"):
            counts = [(fact["fewest_samples"], fact["most_samples"]) for fact in facts]
            cells.append([title, *(f"{a}" if a == b else f"{a} to {b}" for a, b in counts)])
        else:
            starts = [(fact["startup_s"], fact["warmup_s"]) for fact in facts]
            cells.append([title, *(f"{_number(a)} and {_number(b)}" for a, b in starts)])
    notes = ["Effective batch size: samples being generated at once, averaged over time."]
    if not all(fact["has_first_tokens"] for fact in facts):
        notes.append("Where the server gave no first-token times it includes waiting samples.")
    if any(fact.get("seed") is not None for fact in facts):
        notes.append(
            "vLLM draws samples that have seeds one by one, which takes the same time for every "
            "model and brings their seconds closer together."
        )
    if is_pooled:
        notes.append(
            "Reward model seconds: one price per token that it read, from all runs together; it "
            "read them one after another, and what the machine did meanwhile is no difference "
            "between them."
        )
    elif any(fact.get("reward_s_per_sample") is not None for fact in facts):
        notes.append(
            "Reward model seconds are as measured, one run after another: they differ by what the "
            "machine did meanwhile, too."
        )
    if any(fact["distinct_texts"] < 0.5 for fact in facts):
        notes.append("Many equal texts: are the samples copies (seeds, temperature)?")
    header = ["", *(run["name"] for run in group["runs"])]
    return Table("What was run", header, cells, " ".join(notes))


def _seed(seed: int | None) -> str:
    return "none: drawn without seeds" if seed is None else str(seed)


def _metrics(group: dict[str, Any], level: float) -> Table:
    rows = []
    shared = [name for name in group["runs"][0]["metrics"] if _in_all(group, name)]
    for name in shared:
        cells = []
        for run in group["runs"]:
            cells.append(_share_range(run["metrics"][name]))
        rows.append([name, *cells])
    errors = [run["metrics"][name]["mc_error"] for run in group["runs"] for name in shared]
    note = (
        f"In percent, over all subsets of k samples; in brackets {100 * level:g}% bootstrap "
        f"intervals over {group['num_problems']} problems."
    )
    if max(errors) > 0:
        note += f" Largest Monte Carlo error: {100 * max(errors):.2f} points."
    header = ["", *(run["name"] for run in group["runs"])]
    return Table("Coverage and accuracy against samples", header, rows, note)


def _in_all(group: dict[str, Any], name: str) -> bool:
    return all(name in run["metrics"] for run in group["runs"])


def _range(low: float | None, high: float | None, missing: str) -> str:
    return f"{_number(low) if low is not None else missing} to " + (
        _number(high) if high is not None else missing
    )


def _targets(group: dict[str, Any], level: float) -> list[Table]:
    rows = []
    for row in group["targets"]:
        never = "not reached"
        seconds = never
        if row["seconds"] is not None:
            seconds = f"{row['seconds']:.4g} ({_range(row['low_s'], row['high_s'], never)})"
        if row["speedup"] is None:
            ratio = "undefined"
        elif row["seconds"] is None:
            ratio = never
        else:
            ratio = (
                f"{row['speedup']:.2f} {_TIMES} "
                f"({_range(row['speedup_low'], row['speedup_high'], 'undefined')})"
            )
        rows.append(
            [
                METHOD_LABELS[row["method"]],
                f"{100 * row['target']:.1f} % (at {row['at_s']:.3g} s)",
                row["run"],
                seconds,
                _percent(row["share_not_reached"], 0),
                ratio,
            ]
        )
    base = group["baseline"]
    header = ["", f"target: {base} at t", "run", "seconds", "draws that miss it", "speed-up"]
    note = (
        f"Target: the value of {base} at some times, the last one where its curve ends; taken anew "
        "in each bootstrap draw. Seconds: the first time of the grid at which it is reached; "
        f"{100 * level:g}% paired bootstrap intervals over problems. Not reached within the "
        "samples of a run is a result: it counts as infinite time, a speed-up of 0."
    )
    return [Table(f"Seconds until the accuracy of {base}", header, rows, note)]


def _areas(group: dict[str, Any], level: float) -> Table:
    rows = []
    window = None
    for curve in group["curves"]:
        if curve["axis"] == "seconds":
            area = curve["area"]
            window = area["window"]
            rows.append(
                [
                    METHOD_LABELS[curve["method"]],
                    curve["run"],
                    f"{window[0]:.3g} to {window[1]:.3g} s",
                    _share_range(area),
                ]
            )
    note = f"Mean percentage over log time within the window; {100 * level:g}% bootstrap intervals."
    return Table("Area under the curve", ["", "run", "window", "area"], rows, note)


def _best(group: dict[str, Any]) -> list[Table]:
    """Which run is best at some times, chosen on one half of the problems, judged on the other."""
    rows = []
    for row in group["envelopes"]:
        count = len(row["x"])
        for i in sorted({round(j * (count - 1) / 5) for j in range(6)}):
            rows.append(
                [
                    METHOD_LABELS[row["method"]],
                    _number(row["x"][i], ".3g"),
                    row["chosen"][i],
                    _percent(row["share_chosen"][i], 0),
                    _percent(row["y"][i]),
                ]
            )
    note = (
        "The last column is the any-time envelope: at each time the run is chosen on a random half "
        "of the problems and judged on the other half."
    )
    header = ["", "seconds", "best run", "halves that choose it", "what the choice is worth"]
    return [Table("Best run at each time", header, rows, note)]


def _throughput(group: dict[str, Any]) -> Table:
    rows = []
    notes: set[str] = set()
    for run in group["runs"]:
        for row in run["throughput"]:
            cells = [f"{row[field]['median']:.4g}" for field in ("seconds", "tokens_per_s")]
            decode = row["decode_tokens_per_s"]
            cells.append(f"{decode['median']:.4g} ({decode['low']:.4g} to {decode['high']:.4g})")
            rows.append([run["name"], str(row["batch_size"]), *cells, str(row["preemptions"])])
            notes.add(
                f"{row['num_prompt_tokens']} prompt and {row['num_tokens']} new tokens per "
                f"sequence; median of {row['rounds']} rounds (range for decoding)"
                f"{', drawn with seeds' if row.get('seeded') else ''}."
            )
    header = ["run", "sequences", "seconds", "tokens/s", "decoding tokens/s", "preemptions"]
    return Table("Generation speed", header, rows, " ".join(sorted(notes)))


def _limits(group: dict[str, Any]) -> Table:
    """Where curves end, and how exact they are."""
    rows = [
        [
            METHOD_LABELS[curve["method"]],
            curve["axis"],
            curve["run"],
            _number(curve["limit"]),
            _percent(curve["exhausted"][-1]),
            f"{100 * curve['largest_mc_error']:.2f} points",
        ]
        for curve in group["curves"]
    ]
    note = (
        "Samples used up: share of problems whose recorded samples all fit into the largest "
        "budget; beyond it nothing is shown. Monte Carlo error: of drawing random orders or "
        "subsets, largest over the curve."
    )
    header = ["", "axis", "run", "largest budget", "samples used up", "Monte Carlo error"]
    return Table("Limits of the curves", header, rows, note)


def _differences(group: dict[str, Any]) -> Table:
    rows = []
    for setting, values in group["differences"].items():
        for run, value in values.items():
            rows.append([setting, run, json.dumps(value, ensure_ascii=False)])
    note = "These runs were not made under equal conditions; read the comparison with that in mind."
    return Table("Settings that differ between the runs", ["", "run", "value"], rows, note)


def figure_csv(figures: Sequence[tuple[str, Figure]]) -> str:
    """Return the points of figures as CSV, one row each.

    Args:
        figures: name of the group and figure.
    """
    opened = io.StringIO()
    writer = csv.writer(opened, lineterminator="\n")
    writer.writerow(["group", "figure", "series", "x", "y", "low", "high"])
    for group, figure in figures:
        for line in figure.series:
            none: list[float | None] = [None] * len(line.x)
            lows, highs = line.low or none, line.high or none
            for point in zip(line.x, line.y, lows, highs, strict=True):
                numbers = ("" if value is None else f"{value:.8g}" for value in point)
                writer.writerow([group, figure.name, line.name, *numbers])
    return opened.getvalue()
