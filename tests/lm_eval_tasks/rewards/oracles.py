"""The published scoring loops, written out: one solution at a time, full logits, no sharing.

Each follows its publication step by step (sources in `lm_eval_tasks.rewards.protocols`), and none
uses code of the package.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

Scores = list[float]


def rlhflow(folder: Path, question: str, steps: Sequence[str], read_at: int = -3) -> Scores:
    """A growing conversation, one forward pass per step, logits of the third token from the end."""
    tokenizer, model = _load(folder, AutoModelForCausalLM)
    plus, minus = tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]
    conversation: list[dict[str, str]] = []
    scores = []
    for number, step in enumerate(steps):
        content = question + " " + step if number == 0 else step
        conversation.append({"role": "user", "content": content})
        conversation.append({"role": "assistant", "content": "+"})
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
        assert token_ids[read_at + 1] == plus
        logits = model(torch.tensor([token_ids])).logits[:, read_at, [plus, minus]]
        scores.append(logits.softmax(dim=-1)[0, 0].item())
    return scores


def math_shepherd(folder: Path, question: str, steps: Sequence[str]) -> Scores:
    """One pass over question and tagged steps, read wherever the tag's id stands."""
    tokenizer, model = _load(folder, AutoModelForCausalLM)
    candidates = tokenizer.encode("+ -")[1:]
    tag = tokenizer.encode("ки")[-1]
    text = question + " " + "\n".join(step + " ки" for step in steps)
    token_ids = torch.tensor([tokenizer.encode(text)])
    scores = model(token_ids).logits[:, :, candidates].softmax(dim=-1)[:, :, 0]
    found: Scores = scores[token_ids == tag].tolist()
    return found


def qwen_math_prm(folder: Path, question: str, steps: Sequence[str]) -> Scores:
    """System prompt, question, steps joined by the tag; softmax of the head at every tag."""
    tokenizer, model = _load(folder, Qwen2ForCausalLM)
    weights = load_file(folder / "model.safetensors")
    messages = [
        {
            "role": "system",
            "content": "Please reason step by step, and put your final answer within \\boxed{}.",
        },
        {"role": "user", "content": question},
        {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    token_ids = tokenizer.encode(text, return_tensors="pt")
    hidden = model.model(input_ids=token_ids).last_hidden_state
    inner = torch.relu(hidden @ weights["score.0.weight"].T + weights["score.0.bias"])
    logits = inner @ weights["score.2.weight"].T + weights["score.2.bias"]
    is_tag = token_ids == tokenizer.encode("<extra_0>")[0]
    probabilities = torch.softmax(logits, dim=-1) * is_tag.unsqueeze(-1)
    sample = probabilities[0]
    found: Scores = sample[sample != 0].view(-1, 2)[:, 1].tolist()
    return found


def skywork(folder: Path, question: str, steps: Sequence[str]) -> Scores:
    """Pieces tokenised one by one, a newline token after each, sigmoid of the value head there."""
    tokenizer, model = _load(folder, Qwen2ForCausalLM)
    weights = load_file(folder / "model.safetensors")
    token_ids = tokenizer.encode(tokenizer.bos_token + question + "\n")
    flags = [0] * len(token_ids)
    newline = tokenizer.encode("\n")[-1]
    for step in "\n".join(steps).split("\n"):
        step_ids = (tokenizer.encode(step) if step != "" else []) + [newline]
        token_ids += step_ids
        flags += [0] * (len(step_ids) - 1) + [1]
    hidden = model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states[-1]
    value = hidden @ weights["v_head.summary.weight"].T + weights["v_head.summary.bias"]
    rewards = torch.sigmoid(value.squeeze(-1))[0]
    return [rewards[i].item() for i, flag in enumerate(flags) if flag]


ORACLES: dict[str, Callable[[Path, str, Sequence[str]], Scores]] = {
    "rlhflow-deepseek": rlhflow,
    "prm-tiny": rlhflow,
    # In ChatML a newline follows the closing token, so the published -3 would read another one.
    "rlhflow-chatml": lambda folder, question, steps: rlhflow(folder, question, steps, read_at=-4),
    "math-shepherd": math_shepherd,
    "qwen2.5-math-prm": qwen_math_prm,
    "skywork-o1": skywork,
}


def _load(folder: Path, kind: Any) -> tuple[Any, Any]:
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model.requires_grad_(False)
