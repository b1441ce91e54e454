"""Random reward models of 0.1 million parameters, laid out like the published ones.

Tokenizers are built here with the special tokens, pre-tokenisation and chat templates of the
published families; weight files carry the published names.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

QUESTION = "Ann has 3 pens and buys 4. How many pens?"
SOLUTIONS = [
    ["She starts with 3 pens.", "She buys 4 + 0 - 0 more.\nSo 3+4=7.", "The answer is 7."],
    ["The answer is 12."],
    ["3 - 4 = -1", "+", "-", "so: (3+4)-0 = 7 и всё", "The answer is\n\n7"],
]

# The expression by which Llama 3 and Qwen2 cut text before byte-level BPE.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string +"
    " '\n\n<|eot_id|>' }}{%- for message in messages %}{{- '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
)
CHATML_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{%- endfor %}"
)


def byte_level(specials: list[str], template: str | None, **tokens: str) -> Any:
    """A byte-level BPE tokenizer whose only merges are the line breaks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (".", "Ċ"), (".", "ĊĊ"), ("Ġ", "+")]
    vocab = [*alphabet, *(left + right for left, right in merges), *specials]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def llama3_tokenizer() -> Any:
    """As Llama 3.1: header tokens, a date in the system turn, the start token in the template."""
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    names = {"bos_token": specials[0], "eos_token": specials[1]}
    return byte_level(specials, LLAMA3_TEMPLATE, **names)


def qwen_tokenizer(**tokens: str) -> Any:
    """As Qwen2.5: ChatML, no start token of its own, ``<extra_0>``."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>"]
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return byte_level(specials, CHATML_TEMPLATE, **names | tokens)


def arith_tokenizer() -> Any:
    """The tokenizer of the project's own reward model."""
    from thinkfast_distill.data.arith_tokenizer import build_tokenizer

    return build_tokenizer()


def mistral_tokenizer() -> Any:
    """As Mistral 7B: SentencePiece BPE in fast form, a start token added, bytes as fallback."""
    letters = sorted(set("▁ки" + "".join(chr(code) for code in range(33, 127))))
    merges = [("к", "и"), ("▁", "ки"), ("▁", "+"), ("▁", "-")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pieces += [left + right for left, right in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,  # scores far from one half
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _causal(kind: Any, config: Any, make_tokenizer: Callable[[], Any]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(folder)
        torch.manual_seed(3)
        kind(config(**_sizes(tokenizer))).to(torch.float32).save_pretrained(folder)
        return folder

    return build


def _qwen_with_head(
    architecture: str, head: dict[str, tuple[int, ...]], **tokens: str
) -> Callable[[Path], Path]:
    """Qwen2 with a language model head that nobody reads and a reward head, published names."""

    def build(folder: Path) -> Path:
        tokenizer = qwen_tokenizer(**tokens)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(5)
        model = Qwen2ForCausalLM(Qwen2Config(**_sizes(tokenizer))).to(torch.float32)
        weights = dict(model.state_dict())
        for name, shape in head.items():
            weights[name] = torch.randn(shape) * (0.4 if name.endswith("weight") else 1.0)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict() | {"architectures": [architecture], "num_labels": 2}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return build


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "rlhflow-deepseek": _causal(LlamaForCausalLM, LlamaConfig, llama3_tokenizer),
    "rlhflow-chatml": _causal(LlamaForCausalLM, LlamaConfig, qwen_tokenizer),
    "prm-tiny": _causal(LlamaForCausalLM, LlamaConfig, arith_tokenizer),
    "math-shepherd": _causal(MistralForCausalLM, MistralConfig, mistral_tokenizer),
    "qwen2.5-math-prm": _qwen_with_head(
        "Qwen2ForProcessRewardModel",
        {
            "score.0.weight": (64, 64),
            "score.0.bias": (64,),
            "score.2.weight": (2, 64),
            "score.2.bias": (2,),
        },
    ),
    "skywork-o1": _qwen_with_head(
        "Qwen2ForPrmModel",
        {"v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,)},
        bos_token="<|endoftext|>",
    ),
}
