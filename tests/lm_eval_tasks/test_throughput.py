"""Speed measurement with a scripted engine: what is timed, what is stored, what is refused."""

import json
from types import SimpleNamespace

import pytest

from lm_eval_tasks import throughput
from lm_eval_tasks.errors import InputError
from lm_eval_tasks.throughput import (
    THROUGHPUT,
    check_fits,
    measure,
    missing_batch_sizes,
    read_throughput,
    time_batch,
)

pytest.importorskip("vllm")


class ScriptedEngine:
    """Prefills two sequences per step, then gives every running one a token; a step takes 1 s."""

    def __init__(self, clock):
        self.clock = clock
        self.waiting = []
        self.running = {}
        self.log = []
        self.seeds = set()
        self.model_config = SimpleNamespace(max_model_len=100, get_vocab_size=lambda: 50)
        self.renderer = SimpleNamespace(render_cmpl=list)

    def reset_prefix_cache(self):
        self.log.append("reset")
        return True

    def add_request(self, name, prompt, params):
        self.log.append((len(prompt["prompt_token_ids"]), params.max_tokens, params.ignore_eos))
        self.waiting.append([name, params.max_tokens, None])
        self.seeds.add(params.seed)

    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)

    def step(self):
        self.clock.now += 1
        new, self.waiting = self.waiting[:2], self.waiting[2:]
        for entry in new:
            entry[2] = self.clock.now
            self.running[entry[0]] = entry
        outputs = []
        for name, entry in list(self.running.items()):
            entry[1] -= 1
            metrics = SimpleNamespace(first_token_ts=entry[2])
            outputs.append(
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])], metrics=metrics)
            )
            if not entry[1]:
                del self.running[name]
        return outputs


@pytest.fixture
def backend(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return SimpleNamespace(
        engine=ScriptedEngine(clock), tap=SimpleNamespace(num_preemptions=3), max_num_seqs=8
    )


def test_time_batch(backend):
    found = time_batch(backend, [[1, 2, 3]] * 4, 10)
    # Two sequences prefilled in the first second, two in the second; the last ends after 11.
    assert found["seconds"] == 11
    assert found["prefill_s"] == 2
    assert found["tokens_per_s"] == pytest.approx(40 / 11)
    # 6 of the 40 tokens came until then.
    assert found["decode_tokens_per_s"] == pytest.approx(34 / 9)
    assert found["num_preemptions"] == 0
    assert backend.engine.log == ["reset", *[(3, 10, True)] * 4]


def options(**given):
    values = {
        "config_hash": "x",
        "round_number": 0,
        "batch_sizes": [1, 4],
        "num_prompt_tokens": 5,
        "num_tokens": 10,
    }
    return values | given


def test_measure_stores_and_resumes(backend, tmp_path):
    measure(backend, tmp_path, **options(batch_sizes=[1]))
    assert missing_batch_sizes(tmp_path, [4, 1, 4], 0, (5, 10)) == [4]
    measure(backend, tmp_path, **options(batch_sizes=[4]))
    assert missing_batch_sizes(tmp_path, [1, 4], 0, (5, 10)) == []
    assert missing_batch_sizes(tmp_path, [4, 1], 1, (5, 10)) == [1, 4]
    measure(backend, tmp_path, **options(round_number=1))
    rows = read_throughput(tmp_path)
    assert [(row["round"], row["batch_size"]) for row in rows] == [(0, 1), (0, 4), (1, 1), (1, 4)]
    assert rows[1]["seconds"] == 11
    assert backend.engine.seeds == {None}, "vLLM draws seeded sequences row by row"
    assert {row["seeded"] for row in rows} == {False}


@pytest.mark.parametrize("lengths", [(6, 10), (5, 11)])
def test_other_lengths_are_refused(backend, tmp_path, capsys, lengths):
    """Their speeds were taken for those that are there, and for one median."""
    measure(backend, tmp_path, **options())
    assert missing_batch_sizes(tmp_path, [], 0, lengths) == [], "no speeds are asked for"
    with pytest.raises(InputError):
        missing_batch_sizes(tmp_path, [1, 4], 0, lengths)
    prompt, new = lengths
    assert capsys.readouterr().err.endswith(
        f"\nerror: --speed-tokens {prompt} {new}: {tmp_path} has speeds of --speed-tokens 5 10; "
        "give these, or another folder with --out\n"
    )
    more = options(round_number=1, num_prompt_tokens=prompt, num_tokens=new)
    measure(backend, tmp_path, **more)  # as an earlier version did
    with pytest.raises(InputError):
        read_throughput(tmp_path)
    assert "line 3: speeds of different lengths in one file: [(5, 10)" in capsys.readouterr().err


def test_speeds_of_earlier_versions_had_seeds(backend, tmp_path):
    measure(backend, tmp_path, **options())
    path = tmp_path / THROUGHPUT
    path.write_text(path.read_text().replace('"seeded": false, ', ""))
    assert [row["seeded"] for row in read_throughput(tmp_path)] == [True, True]


def test_speeds_of_other_settings_are_left_out(backend, tmp_path, capsys):
    """They stay where samples are deleted to draw others in the same folder."""
    config = tmp_path / "config.json"
    config.write_text('{"config_hash": "old"}')
    measure(backend, tmp_path, **options(config_hash="old", num_tokens=20))
    assert missing_batch_sizes(tmp_path, [1, 4], 0, (5, 20)) == []
    config.write_text('{"config_hash": "new"}')
    capsys.readouterr()
    assert missing_batch_sizes(tmp_path, [1, 4], 0, (5, 10)) == [1, 4], "of any length"
    assert "2 of 2 speeds are of other settings than config.json" in capsys.readouterr().err
    measure(backend, tmp_path, **options(config_hash="new"))
    assert missing_batch_sizes(tmp_path, [1, 4], 0, (5, 10)) == []
    rows = read_throughput(tmp_path)
    assert [(row["batch_size"], row["num_tokens"]) for row in rows] == [(1, 10), (4, 10)]


@pytest.mark.parametrize("name", ["reset_prefix_cache", "add_request", "step"])
def test_engine_that_breaks_down(backend, tmp_path, capsys, monkeypatch, name):
    def fail(*_):
        raise RuntimeError("out of\nmemory")

    measure(backend, tmp_path, **options(batch_sizes=[1]))
    monkeypatch.setattr(backend.engine, name, fail)
    with pytest.raises(InputError):
        measure(backend, tmp_path, **options(batch_sizes=[4]))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: vLLM stopped (RuntimeError: out of memory) while the speed of 4")
    assert len(read_throughput(tmp_path)) == 1


def test_prefix_cache_that_stays(backend, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(backend.engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(InputError):
        measure(backend, tmp_path, **options())
    assert "error: vLLM did not empty its prefix cache" in capsys.readouterr().err


def test_check_fits(backend, capsys):
    check_fits(backend, [1, 8], 5, 95)
    for given, message in (
        (([1], 5, 96), "5 + 96 tokens of the speed measurement exceed the model's length"),
        (([1, 16], 5, 10), "--batch-sizes 16: the engine runs at most 8"),
    ):
        with pytest.raises(InputError):
            check_fits(backend, *given)
        assert message in capsys.readouterr().err


def test_read_throughput_refuses_damaged_lines(backend, tmp_path, capsys):
    measure(backend, tmp_path, **options(batch_sizes=[1]))
    path = tmp_path / THROUGHPUT
    (line,) = path.read_text().splitlines()
    row = json.loads(line)
    for damaged, message in (
        (row, "round 0 at batch size 1 stands there twice"),
        (row | {"seconds": "1"}, "seconds is '1'; need float"),
        ({"round": 0}, "fields are ['round']"),
    ):
        path.write_text(f"{line}\n{json.dumps(damaged)}\n")
        with pytest.raises(InputError):
            read_throughput(tmp_path)
        assert f"line 2: {message}" in capsys.readouterr().err
