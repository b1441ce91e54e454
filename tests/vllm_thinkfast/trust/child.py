"""Reads damaged folders one after another and reports each: the process that is allowed to die.

``python -m tests.vllm_thinkfast.trust.child ROOT``: ROOT holds what ``corpus.write_bases`` made.
Before a case one line with its number is printed,
after it one line of JSON. A case that takes longer than DEADLINE_S ends the process, memory is
limited, and the working directory is where hostile pickles would leave their mark.
"""

import argparse
import faulthandler
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.vllm_thinkfast.trust import corpus, oracle, pickles
from vllm_thinkfast.checkpoints.config_reader import read_config
from vllm_thinkfast.checkpoints.convert import convert_checkpoint
from vllm_thinkfast.checkpoints.folder import read_folder
from vllm_thinkfast.checkpoints.reader import house_tensors

DEADLINE_S = 60.0
MEMORY_BYTES = 2 * 2**30
"""Above what the process has mapped before the first case."""
LONGEST_MESSAGE = 1500
EVERY_CONVERTED = 5
"""One of so many folders that load is also converted and read again."""
EVERY_PARSED = 3
"""One of so many configurations is also read as vLLM reads it."""
_MISFIT = re.compile(
    r"the weights do not match the configuration; [a-z ]+: \S"
    r"|no known layout fits the weights; mixer tensors found: \['"
)
"""With the name of a tensor."""


def read(folder: Path) -> tuple[Any, oracle.Tensors]:
    """(configuration, house name -> tensor), as the command line and the trainer read a folder."""
    config = read_config(folder)
    tensors = read_folder(folder)
    return config, dict(house_tensors(config, tensors, source=str(folder)))


def blame(error: BaseException, case: corpus.Case, allowed: tuple[type, ...]) -> str | None:
    """What is wrong with an error; None if it is a clear one."""
    text = str(error)
    what = f"{type(error).__name__}: {text[:300]!r}"
    if not isinstance(error, allowed):
        return f"no error of input: {what}"
    if "\n" in text or not text.isprintable():
        return f"not one line: {what}"
    if len(text) > LONGEST_MESSAGE:
        return f"{len(text)} characters: {what}"
    if not names_damage(text, case):
        return f"names none of {', '.join(filter(None, case.hints))[:100]}: {what}"
    return None


def names_damage(text: str, case: corpus.Case) -> bool:
    """Whether a message says what was damaged."""
    if any(hint in text for hint in case.hints if hint):
        return True
    # A value that is possible by itself: which field the tensors speak against is a guess that the
    # message does not make.
    if _MISFIT.search(text):
        return True
    # transformers says for some fields what is wrong, but not which.
    is_theirs = "transformers does not accept a field" in text
    return is_theirs and any(file in text for file in case.files)


def check(case: corpus.Case, folder: Path, number: int, has_parser: bool) -> tuple[str, str | None]:
    """(outcome, complaint or None) of one damaged folder."""
    outcome, wrong, config = "refused", None, None
    try:
        config, tensors = read(folder)
    except Exception as error:  # whatever comes out is what is tested
        wrong = blame(error, case, (ValueError,))
    else:
        outcome = "loaded"
        if case.must_fail:
            wrong = "loaded"
        elif not case.has_values:
            wrong = None
        elif found := oracle.complaints(folder, config, tensors):
            wrong = "; ".join(found[:3])
        elif number % EVERY_CONVERTED == 0:
            wrong = check_converted(folder, config, tensors)
    is_turn = has_parser and number % EVERY_PARSED == 0
    if wrong is None and is_turn and any(name.endswith("config.json") for name in case.files):
        wrong = check_parsed(case, folder, config)
    return outcome, wrong


def check_converted(folder: Path, config: Any, tensors: oracle.Tensors) -> str | None:
    """``thinkfast convert`` gives the same model."""
    target = folder.with_name("converted")
    try:
        convert_checkpoint(folder, target)
        after, tensors_after = read(target)
    except Exception as error:  # whatever comes out is what is tested
        return f"after convert {type(error).__name__}: {str(error)[:300]}"
    finally:
        shutil.rmtree(target, ignore_errors=True)
    left_out = {"_name_or_path", "weight_layout", "architectures", "dtype", "transformers_version"}
    fields = {k: v for k, v in config.to_dict().items() if k not in left_out}
    fields_after = after.to_dict()
    for name, value in fields.items():
        if not oracle.same(value, fields_after.get(name)):
            return f"after convert {name}: {fields_after.get(name)!r:.80} instead of {value!r:.80}"
    for name, tensor in tensors.items():
        if not oracle.same_tensor(tensor, tensors_after[name]):
            return f"after convert {name} has other values"
    return None if tensors.keys() == tensors_after.keys() else "after convert other tensors"


def check_parsed(case: corpus.Case, folder: Path, config: Any) -> str | None:
    """vLLM's way to the configuration gives the same one, or a clear error."""
    from vllm_thinkfast.config_parser import ThinkfastConfigParser

    try:
        _, parsed = ThinkfastConfigParser().parse(folder, trust_remote_code=False)
    except Exception as error:  # whatever comes out is what is tested
        if not is_read_by_us(folder):
            return None  # vLLM's own error, which it raises before it asks our parser
        return blame(error, case, (ValueError, OSError))
    if not is_read_by_us(folder):
        return None  # some other model's folder by now
    if config is None:
        # The command line refuses weights too; vLLM does so when it loads them.
        try:
            config = read_config(folder)
        except ValueError as error:
            return f"vLLM's way accepts what the command line refuses: {str(error)[:200]}"
    fields, found = config.to_dict(), parsed.to_dict()
    for name in (fields.keys() | found.keys()) - {"_name_or_path"}:
        if not oracle.same(fields.get(name), found.get(name)):
            return (
                f"vLLM's way reads {name} as {found.get(name)!r:.80}, not {fields.get(name)!r:.80}"
            )
    return None


def is_read_by_us(folder: Path) -> bool:
    """Whether our parser, and not vLLM's, decides about a folder."""
    if (folder / "mamba_config.json").is_file():
        return True
    try:
        kind = oracle.read_json(folder / "config.json").get("model_type")
    except (oracle.UnsoundError, OSError):
        return False
    return kind in ("llamba", "mambainllama")


class Folder:
    """One folder that is damaged and mended again; unchanged files are links."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._base = ""
        self.path = Path(tempfile.mkdtemp(dir=os.getcwd()))

    def damage(self, case: corpus.Case) -> Path:
        """Makes the case's folder."""
        folder = self.path / case.base
        if case.base != self._base:
            shutil.rmtree(self.path)
            folder.mkdir(parents=True)
            for file in (self._root / case.base).iterdir():
                (folder / file.name).symlink_to(file)
            self._base = case.base
        for name, content in case.files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        return folder

    def mend(self, case: corpus.Case) -> None:
        """Puts the valid files back."""
        for name in case.files:
            (self.path / case.base / name).unlink(missing_ok=True)
            if (self._root / case.base / name).exists():
                (self.path / case.base / name).symlink_to(self._root / case.base / name)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Runs the cases from the first one on."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("root", type=Path, help="what corpus.write_bases made")
    arguments.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments.add_argument("--step", type=int, default=1, help="run one of so many cases")
    arguments.add_argument("--no-parser", action="store_true", help="leave vLLM's way out")
    options = arguments.parse_args()
    if not options.no_parser:
        from vllm_thinkfast import config_parser, plugin

        assert config_parser  # imported before memory is limited
        plugin.register()
    torch.set_num_threads(1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
    folder = Folder(options.root)
    for number, case in enumerate(corpus.cases(options.root)):
        if number < options.first or number % options.step:
            continue
        _say(str(number))
        faulthandler.dump_traceback_later(DEADLINE_S, exit=True)
        outcome, wrong = check(case, folder.damage(case), number, not options.no_parser)
        faulthandler.cancel_dump_traceback_later()
        folder.mend(case)
        if Path(pickles.MARK).exists():
            wrong = "its code ran"
            shutil.rmtree(pickles.MARK, ignore_errors=True)
            Path(pickles.MARK).unlink(missing_ok=True)
        _say(json.dumps([case.base, case.what, outcome, wrong]))
    _say("end")


if __name__ == "__main__":
    main()
