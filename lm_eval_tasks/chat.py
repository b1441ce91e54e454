"""Apply the checkpoint's own chat template when lm-eval was not told to.

The boxed-answer prompt is a user turn; an instruct model that gets it bare continues the problem
instead of solving it. lm-eval only warns about that, and only when the model's name has "inst" or
"chat" in it. The tasks therefore look at the checkpoint.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lm_eval_tasks.errors import stop, why_not_loaded
from lm_eval_tasks.option_words import LM_EVAL, OptionWords


def checkpoint_chat_template(
    model_args: Mapping[str, Any], words: OptionWords = LM_EVAL
) -> Callable[..., str] | None:
    """Return a function that renders messages to a prompt, or None when there is no template.

    Args:
        model_args: lm-eval's model arguments, of which ``tokenizer`` or else ``pretrained`` names
            the checkpoint. Without either (API models, model objects) nothing can be looked up.
        words: how to decide otherwise.

    Raises:
        InputError: a checkpoint is named but its tokenizer cannot be loaded.
    """
    source = model_args.get("tokenizer") or model_args.get("pretrained")
    if not isinstance(source, str):
        return None
    from transformers import AutoTokenizer

    is_tokenizer = bool(model_args.get("tokenizer"))
    revision = model_args.get("tokenizer_revision" if is_tokenizer else "revision")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=revision or "main",
            trust_remote_code=model_args.get("trust_remote_code") is True,
        )
    except Exception as error:  # a damaged file: of any class
        stop(
            f"cannot load the tokenizer of {source} to see whether it has a chat template "
            f"({why_not_loaded(error)}); {words.other_template}"
        )
    if not tokenizer.chat_template:
        return None
    extra = dict(model_args.get("chat_template_args") or {})
    if "enable_thinking" in model_args:
        extra.setdefault("enable_thinking", model_args["enable_thinking"])
    return partial(_render, tokenizer, extra)


def _render(
    tokenizer: Any,
    extra: Mapping[str, Any],
    messages: list[dict[str, str]],
    add_generation_prompt: bool = True,
) -> str:
    """Render as lm-eval's model classes do, so that the prompt does not depend on who asked."""
    text: str = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
        **extra,
    )
    return text
