"""A prompt is prefilled once for all of its samples, and no sample's text changes by that."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.reference.random_checkpoints import write_checkpoint
from tests.vllm_thinkfast.models.engines import EnginePool, random_prompts, token_prompts
from vllm_thinkfast import compat

pytestmark = pytest.mark.engine

FAMILIES = ("llamba", "mambainllama_mamba1", "mambainllama_mamba2")
LENGTHS = (7, 100, 511, 512, 1500)
NUM_TOKENS = 12
MAX_NUM_SEQS = 64

FORKED = {"max_model_len": 2048, "max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 600}
"""The plugin's default; prompts of 1500 tokens are prefilled in chunks."""
ALONE = {"max_model_len": 2048, "max_num_seqs": MAX_NUM_SEQS, "enable_prefix_caching": False}
"""No prefix cache: every sample computes its prompt."""

Tokens = list[int]


@pytest.fixture(scope="module", autouse=True)
def _needs_forking() -> None:
    obstacle = compat.fork_obstacle()
    if obstacle is not None:
        pytest.skip(f"every sample prefills its prompt: {obstacle}")


@pytest.fixture(scope="module")
def engines() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fork") / request.param, request.param, seed=11)


def prompt_of(length: int) -> Tokens:
    return random_prompts([length], 150, seed=length)[0]


def sampling(seed: int, **options: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        seed=seed,
        temperature=1.0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **options,
    )


@pytest.fixture(scope="module")
def expected(folder: Path, engines: EnginePool) -> dict[int, list[Tokens]]:
    """For each prompt length the tokens of separate requests with the seeds 0 to 63."""
    llm = engines.get(folder, **ALONE)
    found = {}
    for length in LENGTHS:
        prompts = token_prompts([prompt_of(length)] * MAX_NUM_SEQS)
        params = [sampling(seed) for seed in range(MAX_NUM_SEQS)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found[length] = [list(output.outputs[0].token_ids) for output in outputs]
        assert len({tuple(tokens) for tokens in found[length]}) > MAX_NUM_SEQS // 2
    return found


@pytest.fixture
def llm(folder: Path, expected: dict[int, list[Tokens]], engines: EnginePool) -> Any:
    """The forking engine, after the reference engine has done its part."""
    return engines.get(folder, **FORKED)


class Run:
    """Requests step by step in an engine whose cache starts empty, with prefilled tokens counted.

    A token is prefilled if it belongs to the prompt. Tokens that are computed again after a
    preemption count again.
    """

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        assert self.engine.reset_prefix_cache()
        self.finished: dict[int, list[Tokens]] = {}
        """Tokens of the samples of each request, by the request's seed."""
        self.num_prefilled = self.num_steps = self.num_preemptions = self.most_running = 0

    def add(self, prompt: Sequence[int], seed: int, *, salt: str = "", **options: Any) -> None:
        """Queues a request; its name is its seed."""
        (request,) = token_prompts([prompt])
        if salt:
            request["cache_salt"] = salt
        self.engine.add_request(str(seed), request, sampling(seed, **options))

    def step(self) -> None:
        """One step of the engine."""
        schedule = self.scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            requests = dict(self.scheduler.requests)
            output = schedule(*args, **kwargs)
            cached = output.scheduled_cached_reqs
            starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            starts |= {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
            for name, num_tokens in output.num_scheduled_tokens.items():
                left = requests[name].num_prompt_tokens - starts[name]
                self.num_prefilled += max(0, min(left, num_tokens))
            return output

        self.scheduler.schedule = counted
        try:
            outputs = self.engine.step()
        finally:
            self.scheduler.schedule = schedule
        self.num_steps += 1
        self.most_running = max(self.most_running, len(self.scheduler.running))
        preemptions = [r.num_preemptions for r in self.scheduler.requests.values()]
        self.num_preemptions = max([self.num_preemptions, *preemptions])
        for output in outputs:
            if output.finished:
                samples = [list(sample.token_ids) for sample in output.outputs]
                self.finished[int(output.request_id)] = samples

    def finish(self, before_step: Callable[[], None] = lambda: None) -> dict[int, list[Tokens]]:
        """Steps until nothing is left; returns ``finished``."""
        while self.engine.has_unfinished_requests():
            before_step()
            self.step()
        return self.finished


def separately(expected: list[Tokens], seeds: Sequence[int]) -> dict[int, list[Tokens]]:
    """What ``Run.finished`` is if each seed was a request of its own."""
    return {seed: [expected[seed]] for seed in seeds}


def test_n_samples(llm: Any, expected: dict[int, list[Tokens]]) -> None:
    """SamplingParams(n=N) prefills P + N - 1 tokens; sample i is the request with seed + i."""
    for length in LENGTHS:
        for n in (1, 16, 64):
            run = Run(llm)
            run.add(prompt_of(length), 0, n=n)
            assert run.finish() == {0: expected[length][:n]}, f"{n} samples of {length} tokens"
            assert run.num_prefilled == length + n - 1


def test_equal_requests(llm: Any, expected: dict[int, list[Tokens]]) -> None:
    """Requests in flight, of several prompts in turn, arriving over time."""
    lengths = (100, 512, 1500)
    run = Run(llm)
    arriving = [(length, seed) for seed in range(10) for length in lengths]
    names = {}

    def arrive() -> None:
        for _ in range(5):
            if arriving:
                length, seed = arriving.pop(0)
                names[len(names)] = (length, seed)
                (request,) = token_prompts([prompt_of(length)])
                run.engine.add_request(str(len(names) - 1), request, sampling(seed))

    arrive()
    found = run.finish(arrive)
    assert {names[i]: samples[0] for i, samples in found.items()} == {
        (length, seed): expected[length][seed] for length in lengths for seed in range(10)
    }
    assert run.num_prefilled == sum(lengths) + 9 * len(lengths)


def test_comparison_notices_a_missing_copy(
    llm: Any, expected: dict[int, list[Tokens]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken on purpose: without the copies of the state the samples differ."""
    from vllm.v1.worker import gpu_model_runner

    copies = []
    monkeypatch.setattr(
        gpu_model_runner,
        "copy_kv_cache_blocks_inplace",
        lambda caches, num_blocks, pairs: copies.extend(pairs),
    )
    run = Run(llm)
    run.add(prompt_of(100), 0, n=16)
    (samples,) = run.finish().values()
    assert copies
    assert samples != expected[100][:16]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6])
def test_abort(llm: Any, expected: dict[int, list[Tokens]], num_steps: int) -> None:
    """The sample that prefills is aborted after its first chunk, ..., after the fork; and others.

    Llamba computes 600 + 600 + 299 + 1 tokens, hybrids end chunks at borders of blocks.
    """
    run = Run(llm)
    for seed in range(8):
        run.add(prompt_of(1500), seed)
    for _ in range(num_steps):
        run.step()
    was_computed = run.num_prefilled >= 1499
    num_in_vain = 0 if was_computed else run.num_prefilled
    run.engine.abort_request(["0", "3", "7"])
    assert run.finish() == separately(expected[1500], [1, 2, 4, 5, 6])
    assert run.num_prefilled <= num_in_vain + 1500 + 8


def test_preemption(llm: Any, expected: dict[int, list[Tokens]]) -> None:
    """Everything is preempted, once while the prompt is prefilled and once while samples grow."""
    run = Run(llm)
    for seed in range(16):
        run.add(prompt_of(1500), seed)

    def preempt() -> None:
        if run.num_steps in (2, 9):
            assert run.engine.reset_prefix_cache(reset_running_requests=True)

    assert run.finish(preempt) == separately(expected[1500], range(16))
    assert run.num_preemptions == 2
    # Resumed samples have tokens of their own, so they also compute those again.
    assert run.num_prefilled <= 1200 + 2 * (1500 + 16)


def test_salt(llm: Any, expected: dict[int, list[Tokens]]) -> None:
    """Requests with different cache salts share nothing."""
    run = Run(llm)
    for seed in range(8):
        run.add(prompt_of(100), seed, salt=str(seed % 2))
    assert run.finish() == separately(expected[100], range(8))
    assert run.num_prefilled == 2 * (100 + 4 - 1)


def test_prompt_logprobs(llm: Any, expected: dict[int, list[Tokens]]) -> None:
    """They need every position's logits, so such a request computes its whole prompt."""
    run = Run(llm)
    run.add(prompt_of(100), 0)
    run.finish()
    run.add(prompt_of(100), 1, prompt_logprobs=0)
    assert run.finish() == separately(expected[100], [0, 1])
    assert run.num_prefilled == 200


def test_random_traffic(llm: Any, expected: dict[int, list[Tokens]]) -> None:
    """Arrivals, aborts and preemptions at random: a sample that finishes is right."""
    order = random.Random(5)
    run = Run(llm)
    names: dict[int, tuple[int, int]] = {}

    def act() -> None:
        while len(names) < 150 and order.random() < 0.7:
            length, seed = order.choice(LENGTHS), order.randrange(MAX_NUM_SEQS)
            name = len(names)
            names[name] = (length, seed)
            (request,) = token_prompts([prompt_of(length)])
            run.engine.add_request(str(name), request, sampling(seed))
        if names and order.random() < 0.2:
            run.engine.abort_request([str(order.choice(list(names)))])
        if order.random() < 0.03:
            run.engine.reset_prefix_cache(reset_running_requests=True)

    while len(names) < 150:
        act()
        run.step()
    run.finish(act)
    wrong = [
        (name, names[name])
        for name, (tokens,) in run.finished.items()
        if tokens != expected[names[name][0]][names[name][1]]
    ]
    assert not wrong
    assert len(run.finished) > 75
    assert run.num_preemptions > 0


def test_memory_pressure(
    folder: Path, engines: EnginePool, expected: dict[int, list[Tokens]]
) -> None:
    """A cache too small for all samples: some wait or are preempted, and all texts are right."""
    num_blocks = 12 if folder.name == "llamba" else 40
    llm = engines.get(folder, **FORKED, num_gpu_blocks_override=num_blocks)
    run = Run(llm)
    for seed in range(32):
        run.add(prompt_of(512), seed)
    assert run.finish() == separately(expected[512], range(32))
    assert run.most_running < 32
