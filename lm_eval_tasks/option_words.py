"""What the options are called where a task is built: lm-eval's words, or those of a command.

The task classes serve ``lm_eval`` and ``thinkfast-eval`` alike; a message with the other one's
words sends its reader to an option that does not exist.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class OptionWords:
    """How to give what the tasks read."""

    data_file: str
    """Before the file's name."""
    bare_prompt: str
    """Samples without a chat template."""
    other_template: str
    """What to do where the checkpoint's tokenizer cannot be loaded."""


LM_EVAL = OptionWords(
    data_file="--metadata data_file=",
    bare_prompt="--metadata chat_template=off",
    other_template="decide with --apply_chat_template or --metadata chat_template=off",
)
SAMPLE = OptionWords(
    data_file="--data-file ",
    bare_prompt="--chat-template off",
    other_template="check --model and --revision, name the folder of a tokenizer with --tokenizer, "
    "or sample the bare prompt with --chat-template off",
)
COMPARE = OptionWords(
    data_file=SAMPLE.data_file,
    bare_prompt=SAMPLE.bare_prompt,
    other_template="check --model, name the folder of a tokenizer with --model "
    "PATH,tokenizer=FOLDER, or sample the bare prompt with --chat-template off",
)
