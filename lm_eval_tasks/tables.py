"""The tables of a report, and its numbers as CSV, from the analysed groups alone."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_tasks.figures import METHOD_LABELS, Figure, in_flight
from lm_eval_tasks.provenance import changes_of, session_rows

_REGIMES = {
    "saturated": "saturated: all problems share the server; seconds are server seconds per problem",
    "latency": "latency: one problem at a time owns the server; seconds since its submission",
}
_TIMES = "\N{MULTIPLICATION SIGN}"
_ONE_ROUND = "one round: no spread"
#: Largest ratio of cache sizes that passes as equal: caches are whole blocks of other sizes.
_EQUAL_MEMORY = 1.05


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
    return f"{text}; {in_flight(group)}" if group["k"] else text


def tables_of(group: dict[str, Any], level: float) -> list[Table]:
    """Return the tables of a group.

    Args:
        group: of `lm_eval_tasks.analysis.analyse`.
        level: of the intervals.
    """
    found = [what_was_run(group["regime"], group["runs"]), _metrics(group, level)]
    found += [*_targets(group, level), _areas(group, level), *_best(group), _front(group)]
    found += [_throughput(group), _limits(group), _rewards(group), _sessions(group)]
    found += [_changes(group), _differences(group)]
    return [table for table in found if table.rows]


def _percent(value: float | None, digits: int = 1) -> str:
    return "unknown" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None, form: str = ".4g") -> str:
    return "unknown" if value is None else format(value, form)


def _share_range(interval: dict[str, float]) -> str:
    value, low, high = (f"{100 * interval[end]:.1f}" for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def what_was_run(regime: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return what a reader needs to doubt a comparison.

    Args:
        regime: of the runs.
        runs: ``name`` and ``facts`` (of `lm_eval_tasks.analysis.load_run`) of each.
    """
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
        ("the same by round, least to most (timing spread)", "rounds", _round_speeds),
        ("server seconds per sample", "server_s_per_sample", _number),
        ("busy server seconds", "busy_s", _number),
        ("share of them in which the batch only emptied", "drain_share", _percent),
        ("preemptions", "preemptions", _number),
        ("cache for keys, values and states", "caches", _caches),
        ("sessions", "num_sessions", str),
        ("start-up and warm-up, excluded [s]", "", None),
    ]
    facts = [run["facts"] for run in runs]
    # Reports of earlier versions have fewer facts.
    rows = [row for row in rows if row[1] not in ("rounds", "caches") or row[1] in facts[0]]
    if any("reward_s_per_sample" in fact for fact in facts):
        rows.append(("reward model seconds per sample", "reward_s_per_sample", _number))
    is_pooled = any(fact.get("measured_reward_s_per_sample") is not None for fact in facts)
    if is_pooled:
        rows.append(("the same as measured", "measured_reward_s_per_sample", _number))
    if any(fact["resumed_problems"] for fact in facts) and regime == "latency":
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
    for run in runs:
        if run["facts"].get("unfinished"):
            notes.append(f"{run['name']} is not finished: {run['facts']['unfinished']}.")
    if any(fact["distinct_texts"] < 0.5 for fact in facts):
        notes.append("Many equal texts: are the samples copies (seeds, temperature)?")
    sizes = [cache["bytes"] for fact in facts for cache in fact.get("caches", [])]
    if sizes and None not in sizes and max(sizes) > _EQUAL_MEMORY * min(sizes):
        notes.append("The caches differ in size: the runs did not have the same memory.")
    header = ["", *(run["name"] for run in runs)]
    return Table("What was run", header, cells, " ".join(notes))


def _round_speeds(rounds: Sequence[Mapping[str, Any]]) -> str:
    speeds = [one["num_tokens"] / one["busy_s"] for one in rounds if one["busy_s"]]
    if len(speeds) < 2:
        return _ONE_ROUND
    return f"{min(speeds):.4g} to {max(speeds):.4g} ({len(speeds)} rounds)"


def _caches(caches: Sequence[Mapping[str, Any]]) -> str:
    texts = []
    for one in caches:
        size = "bytes unknown" if one["bytes"] is None else f"{one['bytes'] / 2**20:,.1f} MiB"
        texts.append(f"{one['num_blocks']:,} blocks of {one['block_size']} tokens, {size}")
    return " or ".join(texts) or "unknown"


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
                _spread(row, "round_low_s", "round_high_s"),
                _percent(row["share_not_reached"], 0),
                ratio,
                _spread(row, "round_speedup_low", "round_speedup_high"),
            ]
        )
    base = group["baseline"]
    header = ["", f"target: {base} at t", "run", "seconds", "timing spread: seconds"]
    header += ["draws that miss it", "speed-up", "timing spread: speed-up"]
    note = (
        f"Target: the value of {base} at some times, the last one where its curve ends; taken anew "
        "in each bootstrap draw. Seconds: the first time of the grid at which it is reached; in "
        f"brackets {100 * level:g}% paired bootstrap intervals over problems, which know nothing "
        "of timing noise. Timing spread: least to most over the rounds, had the speed of one round "
        "held throughout. Not reached within the samples of a run is a result: it counts as "
        "infinite time, a speed-up of 0."
    )
    return [Table(f"Seconds until the accuracy of {base}", header, rows, note)]


def _spread(row: Mapping[str, Any], low: str, high: str) -> str:
    """Return what the rounds say of a time or speed-up."""
    if "rounds" not in row:
        return "unknown"  # a report of an earlier version
    if row["rounds"] < 2:
        return _ONE_ROUND
    if row[low] is None:
        is_paired = row["rounds"] == row["baseline_rounds"]
        if "speedup" in low and row["round_low_s"] is not None and not is_paired:
            return f"{row['rounds']} rounds, baseline {row['baseline_rounds']}: not paired"
        return ""
    return f"{row[low]:.4g} to {row[high]:.4g} ({row['rounds']} rounds)"


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


def _front(group: dict[str, Any]) -> Table:
    """Which run is on the Pareto front, and when."""
    rows: list[list[str]] = []
    for stretch in front_stretches(group["fronts"]):
        first, last = stretch[0], stretch[-1]
        rows.append(
            [
                METHOD_LABELS[first["method"]],
                first["run"],
                f"{_number(first['seconds'], '.3g')} to {_number(last['seconds'], '.3g')}",
                f"{_percent(first['value'])} to {_percent(last['value'])}",
            ]
        )
    note = (
        "The front: the points that no run beats or equals in the same or a shorter time. Of the "
        "mean curves: where their intervals overlap, the order may be chance."
    )
    return Table("Pareto front", ["", "run on the front", "seconds", "value"], rows, note)


def front_stretches(front: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the points of fronts, divided where the method or the run changes."""
    stretches: list[list[dict[str, Any]]] = []
    for point in front:
        before = stretches[-1][-1] if stretches else {}
        if (before.get("method"), before.get("run")) == (point["method"], point["run"]):
            stretches[-1].append(point)
        else:
            stretches.append([point])
    return stretches


def _throughput(group: dict[str, Any]) -> Table:
    rows = []
    notes: set[str] = set()
    for run in group["runs"]:
        for row in run["throughput"]:
            fields = ("seconds", "tokens_per_s", "decode_tokens_per_s")
            cells = [_median(row[field], row["rounds"]) for field in fields]
            rounds = _ONE_ROUND if row["rounds"] < 2 else str(row["rounds"])
            preemptions = str(row["preemptions"])
            rows.append([run["name"], str(row["batch_size"]), rounds, *cells, preemptions])
            lengths = f"{row['num_prompt_tokens']} prompt and {row['num_tokens']} new tokens"
            notes.add(f"{lengths} per sequence{', drawn with seeds' if row.get('seeded') else ''}.")
    header = ["run", "sequences", "rounds", "seconds", "tokens/s", "decoding tokens/s"]
    note = "Median over rounds; in brackets the timing spread, least to most over rounds."
    return Table(
        "Generation speed", [*header, "preemptions"], rows, " ".join([*sorted(notes), note])
    )


def _median(found: Mapping[str, float], rounds: int) -> str:
    median, low, high = (f"{found[end]:.4g}" for end in ("median", "low", "high"))
    return median if rounds < 2 else f"{median} ({low} to {high})"


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


_REWARD_FIELDS = (
    *("model", "model_id", "tokenizer_id", "protocol", "protocol_version", "split", "backend"),
    *("dtype", "max_tokens", "resolved"),
)


def _rewards(group: dict[str, Any]) -> Table:
    """Which reward model the scores are of, and how it was run."""
    runs = [run for run in group["runs"] if run.get("reward")]
    rows = []
    for field in _REWARD_FIELDS:
        values = [run["reward"]["description"].get(field) for run in runs]
        if any(value is not None for value in values):
            rows.append([field.replace("_", " "), *map(_text, values)])
    for field in ("name", "reward_hash"):
        rows.append([field.replace("_", " "), *(_text(run["reward"][field]) for run in runs)])
    note = ""
    if any(not run["reward"]["description"] for run in runs):
        note = "Where the model is unknown, scores/NAME.json is missing in the run folder."
    header = ["", *(run["name"] for run in runs)]
    return Table("Reward model", header, rows if runs else [], note)


def _sessions(group: dict[str, Any]) -> Table:
    """Every start of drawing, grading and reading."""
    rows = []
    for run in group["runs"]:
        for name, row in session_rows(run):
            excluded = [row.get(field) for field in ("startup_s", "warmup_s")]
            cells = [_number(value) if value is not None else "" for value in excluded]
            count = row.get("drawn", row.get("num_judged"))
            rows.append(
                [run["name"], name, row.get("started", "unknown"), _text(count, ""), *cells]
            )
    header = ["run", "session", "started", "samples", "start-up [s]", "warm-up [s]"]
    return Table("Sessions", header, rows, "Start-up and warm-up are outside of all times.")


def _changes(group: dict[str, Any]) -> Table:
    """Versions and hardware that are not those of a run's other sessions."""
    rows = [
        [run["name"], field.replace("_", " "), session, _text(value)]
        for run in group["runs"]
        for field, session, value in changes_of(run)
    ]
    note = "Times of these sessions are not of one machine and one software; verdicts and scores "
    note += "may have been made by several versions."
    header = ["run", "", "session", "value"]
    return Table("Conditions that changed between the sessions of a run", header, rows, note)


def _text(value: Any, missing: str = "unknown") -> str:
    if value is None:
        return missing
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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

    Returns:
        Columns group, figure, series, x, y, low, high, on_front (1 or 0; empty where no front was
        computed).
    """
    opened = io.StringIO()
    writer = csv.writer(opened, lineterminator="\n")
    writer.writerow(["group", "figure", "series", "x", "y", "low", "high", "on_front"])
    for group, figure in figures:
        for line in figure.series:
            none: list[float | None] = [None] * len(line.x)
            lows, highs = line.low or none, line.high or none
            fronts = [""] * len(line.x) if line.on_front is None else [*map(int, line.on_front)]
            for *point, front in zip(line.x, line.y, lows, highs, fronts, strict=True):
                numbers = ("" if value is None else f"{value:.8g}" for value in point)
                writer.writerow([group, figure.name, line.name, *numbers, front])
    return opened.getvalue()
