"""The tokenizer of the ``arith`` problems, built by code: byte-level BPE of 514 tokens.

Every number from 0 to 99 and every word of the problems is one token: with digits as tokens a model
of this size learns the sums many times more slowly. Any other text is still encoded, byte by byte.
The merges come from the word list below by the usual BPE rule with ties broken by spelling, so that
the file does not depend on the version of a training library.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thinkfast_distill.data.arith import ITEMS, MONTHS, NAMES, SENTENCES

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

#: ``<|eos|>`` ends the assistant's turn and is the last trained token; other turns end with the
#: next role. Leading and trailing space of a turn is dropped.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer with its chat template; the same on every machine."""
    specials = [PAD, BOS, EOS, *ROLES]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(str(tens), str(ones)) for tens in range(1, 10) for ones in range(10)]
    merges += [("#", "#"), ("##", "##"), *_word_merges(_words())]
    tokens = [*specials, *alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def write_tokenizer(folder: Path) -> None:
    """Writes the tokenizer in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(folder)


def _words() -> list[str]:
    """The words as the pre-tokeniser sees them; ``Ġ`` is the space before a word."""
    texts = [f"{sentence} {sentence}" for choices in SENTENCES.values() for sentence in choices]
    texts.append("X has apples. How many X does X have now?")
    words = {f" {word}" for word in (*NAMES, *ITEMS, *MONTHS)} | set(NAMES) | set(MONTHS) | {"In"}
    for text in texts:
        for piece in text.replace("{month} {name}", "X").replace("{n}", "1").split()[1:]:
            word = piece.strip(".?")
            if word.isalpha() and word != "X":
                words.add(f" {word}")
    return sorted(word.replace(" ", "Ġ") for word in words)


def _word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges until every word is one token, the most frequent pair first."""
    pieces = [list(word) for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(piece) > 1 for piece in pieces):
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(piece, best) for piece in pieces]
    return merges


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in piece:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
