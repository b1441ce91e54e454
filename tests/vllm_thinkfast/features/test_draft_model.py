"""A Llamba as draft model: the same tokens as without drafts, whatever happens to a sequence."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.random_checkpoints import write_checkpoint
from tests.vllm_thinkfast.features.conftest import FAMILIES, PLAIN, folder_of
from tests.vllm_thinkfast.features.run_drafts import run_drafts
from tests.vllm_thinkfast.features.test_drafts import LONG
from tests.vllm_thinkfast.models.engines import EnginePool, greedy, random_prompts, token_prompts
from vllm_thinkfast import compat

pytestmark = pytest.mark.engine
needs_drafts = pytest.mark.skipif(
    not compat.has_drafts(), reason="drafts are refused with this vLLM"
)

NUM_TOKENS = 60
DRAFTER = {"model": "vllm_thinkfast.drafter.RecurrentDrafter", "num_speculative_tokens": 3}
FEATURE = "speculative decoding, one of these models as draft"
HYBRIDS = ["mambainllama_mamba1", "mambainllama_mamba2"]


@pytest.fixture
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's model; most need only one family."""
    return folder_of(model, tmp_path_factory.getbasetemp())


def drafting_with(folder: Path) -> dict[str, Any]:
    """Options of an engine whose drafts come from this model."""
    return {
        "speculative_config": DRAFTER,
        "additional_config": {"draft_model": str(folder)},
    }


def vllms_own(folder: Path) -> dict[str, Any]:
    """How vLLM is told to draft with this model in its own way."""
    return {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}


def similar_model(folder: Path, parent: Path) -> Path:
    """A copy with slightly other weights, which is right about many tokens and wrong about some."""
    copied = parent / "similar"
    write_checkpoint(copied, "llamba", seed=11, has_tokenizer=True)
    file = copied / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(0)
    save_file({k: t * (1 + 0.03 * torch.randn(t.shape)) for k, t in tensors.items()}, file)
    return copied


@needs_drafts
@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize("model", ["llamba"])
def test_similar_llamba(folder: Path, engines: EnginePool, tmp_path: Path) -> None:
    """Some drafts are rejected; sequences are preempted, and prompts come in short chunks."""
    expected = greedy(engines.get(folder, **PLAIN), LONG, NUM_TOKENS)
    found = run_drafts(
        folder,
        LONG,
        NUM_TOKENS,
        preempted_at=[25, 40, 60],
        max_num_batched_tokens=10,
        enable_chunked_prefill=True,
        **drafting_with(similar_model(folder, tmp_path)),
    )
    assert 0.2 < found.num_accepted / found.num_drafted < 0.95, found
    assert found.tokens == expected


@needs_drafts
@pytest.mark.parametrize("model", HYBRIDS)
def test_hybrid_target(folder: Path, engines: EnginePool, tmp_path: Path) -> None:
    """Drafts of a model that knows nothing of the target are rejected, and nothing changes."""
    expected = greedy(engines.get(folder, **PLAIN), LONG, NUM_TOKENS)
    found = run_drafts(folder, LONG, NUM_TOKENS, **drafting_with(folder_of("llamba", tmp_path)))
    assert found.num_accepted < found.num_drafted / 4
    assert found.tokens == expected


@needs_drafts
@pytest.mark.parametrize("model", ["llamba"])
@pytest.mark.parametrize(
    "trouble",
    [
        {},
        {
            "preempted_at": [25, 40, 60],
            "max_num_batched_tokens": 10,
            "enable_chunked_prefill": True,
        },
    ],
    ids=["moving", "preempted"],
)
def test_own_drafts_are_accepted(folder: Path, trouble: dict[str, Any]) -> None:
    """With itself as draft model every draft is right, if each row has its own state.

    Requests come and go, so that rows of the batch move.
    """
    prompts = [LONG[0], [5], LONG[1][:7], [3, 3, 4], LONG[3], [8], LONG[0]]
    found = run_drafts(
        folder,
        prompts,
        NUM_TOKENS,
        arrivals=[0, 0, 4, 6, 9, 17, 19],
        **trouble,
        **drafting_with(folder),
    )
    assert found.num_drafted > len(prompts) * NUM_TOKENS / 2
    assert found.num_accepted == found.num_drafted


@needs_drafts
@pytest.mark.parametrize("model", ["llamba"])
def test_samples_share_their_prompt(folder: Path) -> None:
    """The draft model computes a prompt once, also for samples that come later."""
    prompt, num_samples, num_tokens = random_prompts([400], 150, seed=5)[0], 4, 20
    found = run_drafts(
        folder,
        [prompt] * num_samples,
        num_tokens,
        arrivals=[0, 0, 3, 6],
        max_num_batched_tokens=2048,
        **drafting_with(folder),
    )
    # Each generated token is read, and each is the beginning of at most one draft.
    at_most = len(prompt) + num_samples * num_tokens * (1 + DRAFTER["num_speculative_tokens"])
    assert at_most < 2 * len(prompt)
    assert len(prompt) < found.num_computed <= at_most


@needs_drafts
@pytest.mark.parametrize("model", ["llamba"])
def test_sampled_tokens(folder: Path, engines: EnginePool, tmp_path: Path) -> None:
    """With a temperature, texts are as frequent as without drafts.

    On CPUs vLLM 0.32 itself divides by what the memory holds, see ``cpu_patches``.
    """
    from vllm import SamplingParams

    prompts, num_tokens = [LONG[0][:6]] * 2000, 3
    sampling = {"temperature": 0.7, "top_k": 2, "top_p": 0.95}
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=False, **sampling)
    outputs = engines.get(folder, max_num_seqs=64).generate(
        token_prompts(prompts), params, use_tqdm=False
    )
    plain = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    found = run_drafts(
        folder,
        prompts,
        num_tokens,
        sampling=sampling,
        max_num_seqs=64,
        **drafting_with(similar_model(folder, tmp_path)),
    )
    drafted = Counter(map(tuple, found.tokens))
    assert 4 < len(plain) <= 8
    assert 0.2 < found.num_accepted / found.num_drafted < 0.95, found[1:]
    differences = [abs(plain[text] - drafted[text]) for text in plain | drafted]
    # Two samples of one distribution: 0.04 on average with 8 texts.
    assert sum(differences) / 2 / len(prompts) < 0.08, (plain, drafted)


@pytest.mark.parametrize("model", ["llamba"])
def test_vllms_own_method_is_refused(folder: Path, engines: EnginePool) -> None:
    of_any_draft = r"speculative_config: recurrent models need vLLM"
    with_drafts = r"speculative_config: method .draft_model.*RecurrentDrafter"
    reason = with_drafts if compat.has_drafts() else of_any_draft
    with pytest.raises(ValueError, match=reason):
        engines.get(folder, speculative_config=vllms_own(folder))


def why_not() -> str:
    """The reason with the installed vLLM; below FIRST_WITH_DRAFTS every draft is refused."""
    if not compat.has_drafts():
        return f"recurrent models need vLLM {compat.FIRST_WITH_DRAFTS} for drafts of any kind"
    return (
        "its attention layers would need blocks of vLLM's cache, of which vLLM gives a draft model "
        "those of a single kind only"
    )


@pytest.mark.feature(FEATURE, refused=why_not())
@pytest.mark.parametrize("model", HYBRIDS if compat.has_drafts() else FAMILIES)
def test_draft_is_refused(folder: Path, engines: EnginePool) -> None:
    if compat.has_drafts():
        reason, options = "cannot draft; accepted: Llamba", drafting_with(folder)
    else:
        reason, options = "recurrent models need", {"speculative_config": vllms_own(folder)}
    with pytest.raises(ValueError, match=reason):
        engines.get(folder, **options)


@needs_drafts
@pytest.mark.parametrize("model", ["llamba"])
@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({}, r"additional_config: 'draft_model' is None; it must name the folder"),
        ({"draft_model": 3}, r"additional_config: 'draft_model' is 3; it must name"),
    ],
)
def test_unnamed_draft_model(
    folder: Path, engines: EnginePool, extra: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        engines.get(folder, speculative_config=DRAFTER, additional_config=extra)


@needs_drafts
@pytest.mark.parametrize("model", ["llamba"])
def test_other_vocabulary(folder: Path, engines: EnginePool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_checkpoint(other, "llamba", config={"vocab_size": 168}, has_tokenizer=True)
    with pytest.raises(ValueError, match=r"its vocabulary has 168 tokens, the target's 160"):
        engines.get(folder, **drafting_with(other))
