"""Sampled texts and their seeds."""

import copy
import json
import pickle

from lm_eval_tasks.samples import SampledText, sample_seed


def test_sampled_text_is_a_string_that_keeps_its_facts() -> None:
    text = SampledText("a \\boxed{1}", 7, "length")
    assert text == "a \\boxed{1}"
    assert json.dumps(text) == json.dumps(str(text))
    for copied in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text)):
        assert copied == text
        assert (copied.num_tokens, copied.finish_reason) == (7, "length")
    assert text.is_truncated
    assert not SampledText("", 1, "stop").is_truncated


def test_sample_seed_is_reproducible_and_distinct() -> None:
    seeds = {
        sample_seed(run, problem, index)
        for run in (0, 1, 1234)
        for problem in ("t/1", "t/11", "u/1")
        for index in range(200)
    }
    assert len(seeds) == 3 * 3 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Pinned: another value would silently change every seeded run.
    assert sample_seed(1234, "gsm8k_passk/0", 0) == 6983572907145955680
