"""``python -m thinkfast_distill.data.tokenise``: writes a source as a pre-tokenised folder.

The source is given as in a recipe. Order and content of the folder are those of the source; a run
reads it in its own order. The folder appears under its name only when it is complete: until then it
is ``NAME.partial``, from which the same command continues after an interruption, token by token the
same as without one.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from thinkfast_distill.data.decontaminate import Decontaminator
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import DEFAULT_DATE, Formatter, read_chat_template
from thinkfast_distill.data.memmap import (
    COMPLETION,
    FORMAT_VERSION,
    META,
    OFFSETS,
    TOKENS,
)
from thinkfast_distill.data.presets import SOURCES, expand
from thinkfast_distill.data.source_config import (
    ArithSourceConfig,
    MemmapSourceConfig,
    RecordSourceConfig,
    SourceConfig,
    source_config,
)
from thinkfast_distill.data.sources import Document, read_in_order

PROGRESS = "progress.json"


class Writer:
    """Appends documents to ``OUT.partial`` and makes it ``OUT`` at the end."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Starts, or continues a part written with the same settings.

        Raises:
            DataError: ``out`` exists, or the part was written with other settings.
        """
        self.out, self._settings = out, dict(settings)
        self._partial = out.with_name(out.name + ".partial")
        if out.exists():
            raise DataError(f"{out} exists; remove it, or choose another --out")
        self._names = [TOKENS, OFFSETS] + ([] if settings["layout"] == "text" else [COMPLETION])
        self.progress: dict[str, Any] = {
            "records": 0,
            "num_documents": 0,
            "num_tokens": 0,
            "dropped": {"exact": 0, "ngram": 0, "long": 0},
        }
        if (self._partial / PROGRESS).exists():
            self._continue()
        else:
            self._partial.mkdir(parents=True, exist_ok=True)
            for name in self._names:
                (self._partial / name).write_bytes(b"")
        self._files: dict[str, BinaryIO] = {
            name: (self._partial / name).open("ab") for name in self._names
        }
        if self._files[OFFSETS].tell() == 0:
            self._files[OFFSETS].write(np.zeros(1, dtype=np.int64).tobytes())
            self.save()

    def _continue(self) -> None:
        saved = json.loads((self._partial / PROGRESS).read_text(encoding="utf-8"))
        if saved["settings"] != self._settings:
            keys = [k for k in self._settings if saved["settings"].get(k) != self._settings[k]]
            raise DataError(
                f"{self._partial} was begun with another {', '.join(keys)}; remove it, or repeat "
                "the command it was begun with"
            )
        self.progress = saved["progress"]
        sizes = {
            TOKENS: 4 * self.progress["num_tokens"],
            OFFSETS: 8 * (self.progress["num_documents"] + 1),
            COMPLETION: self.progress["num_tokens"],
        }
        for name in self._names:  # what was written after the last save is written again
            file = self._partial / name
            if not file.exists() or file.stat().st_size < sizes[name]:
                raise DataError(f"{file} is damaged; remove {self._partial} and start again")
            os.truncate(file, sizes[name])

    def add(self, document: Document) -> None:
        """Appends a document."""
        tokenised = document.tokenised
        self.progress["num_tokens"] += len(tokenised.tokens)
        self.progress["num_documents"] += 1
        self._files[TOKENS].write(tokenised.tokens.astype(np.uint32).tobytes())
        end = np.asarray([self.progress["num_tokens"]], dtype=np.int64)
        self._files[OFFSETS].write(end.tobytes())
        if COMPLETION in self._files:
            self._files[COMPLETION].write(tokenised.completion.astype(np.uint8).tobytes())

    def save(self) -> None:
        """Makes everything so far safe against an interruption."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        text = json.dumps({"settings": self._settings, "progress": self.progress})
        temporary = self._partial / (PROGRESS + ".new")
        with temporary.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(self._partial / PROGRESS)

    def finish(self) -> dict[str, Any]:
        """Writes ``meta.json`` and gives the folder its name.

        Raises:
            DataError: no document was written.
        """
        self.save()
        self.close()
        if not self.progress["num_documents"]:
            raise DataError(f"no document left to write ({self.progress['dropped']} dropped)")
        meta = {"version": FORMAT_VERSION, **self._settings, **self.progress}
        (self._partial / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        # In this order: without its progress, a part that is killed in between would begin again.
        self._partial.rename(self.out)
        (self.out / PROGRESS).unlink()
        return meta

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


def tokenise(
    config: SourceConfig,
    formatter: Formatter,
    out: Path,
    *,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
    decontaminator: Decontaminator | None = None,
    save_every: int = 10_000,
) -> dict[str, Any]:
    """Writes a source as a pre-tokenised folder.

    Args:
        config: the source; a memmap cannot be read again.
        formatter: tokenizer and template.
        out: the folder to make.
        max_documents: stop after so many; None for all.
        max_tokens: stop at the end of the document that reaches so many; None for all.
        max_document_tokens: leave longer documents out.
        decontaminator: leave documents out in which it finds something.
        save_every: records between two saves.

    Returns:
        the content of ``meta.json``.

    Raises:
        DataError: the source cannot be used or ``out`` exists.
    """
    if isinstance(config, MemmapSourceConfig):
        raise DataError("kind: memmap is tokenised already")
    source = {
        key: value
        for key, value in config.settings().items()
        if key not in ("tokens", "weight", "epochs")
    }
    layout = config.layout if isinstance(config, RecordSourceConfig) else "prompt"
    settings = {
        "source": source,
        "layout": layout,
        "tokenizer": formatter.fingerprint,
        "chat_template": formatter.template_fingerprint,
        "max_documents": max_documents,
        "max_tokens": max_tokens,
        "max_document_tokens": max_document_tokens,
        "decontamination": None
        if decontaminator is None
        else {"problems": decontaminator.num_problems, "fingerprint": decontaminator.fingerprint},
    }
    writer = Writer(out, settings)
    progress = writer.progress
    try:
        for document in _rest(config, formatter, progress["records"]):
            is_enough = max_documents is not None and progress["num_documents"] >= max_documents
            if is_enough or (max_tokens is not None and progress["num_tokens"] >= max_tokens):
                break
            progress["records"] += 1
            reason = _reason_to_drop(document, max_document_tokens, decontaminator)
            if reason is None:
                writer.add(document)
            else:
                progress["dropped"][reason] += 1
            if progress["records"] % save_every == 0:
                writer.save()
        return writer.finish()
    finally:
        writer.close()


def _rest(config: SourceConfig, formatter: Formatter, first: int) -> Iterator[Document]:
    try:
        yield from read_in_order(config, formatter, first)
    except DataError as error:
        raise DataError(f"source {config.label}: {error}") from error


def _reason_to_drop(
    document: Document, max_tokens: int | None, decontaminator: Decontaminator | None
) -> str | None:
    if max_tokens is not None and len(document) > max_tokens:
        return "long"
    if decontaminator is not None:
        return decontaminator.find(document.texts or [])
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkfast_distill.data.tokenise",
        description="Writes a source as a pre-tokenised folder; continues after an interruption.",
    )
    parser.add_argument(
        "source",
        help="a preset (" + ", ".join(SOURCES) + "), or a source as in a recipe: "
        "'{kind: jsonl, path: FILE, layout: text}'",
    )
    parser.add_argument("--tokenizer", required=True, help="folder or hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--chat-template", type=Path, help="Jinja file instead of the tokenizer's")
    parser.add_argument(
        "--date", default=DEFAULT_DATE, help="date in the template, default %(default)s"
    )
    parser.add_argument("--max-documents", type=int, help="stop after so many documents")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens")
    parser.add_argument("--max-document-tokens", type=int, help="leave longer documents out")
    parser.add_argument(
        "--decontaminate", nargs="*", default=[], help="JSON lines files of evaluation problems"
    )
    options = parser.parse_args(arguments)
    try:
        config = _source(options.source)
        formatter = _formatter(options)
        files = options.decontaminate
        meta = tokenise(
            config,
            formatter,
            options.out,
            max_documents=options.max_documents,
            max_tokens=options.max_tokens,
            max_document_tokens=options.max_document_tokens,
            decontaminator=Decontaminator.from_files(files) if files else None,
        )
    except (ValueError, OSError) as error:  # DataError, RecipeError
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(
        f"{options.out}: {meta['num_documents']} documents, {meta['num_tokens']} tokens; dropped "
        + ", ".join(f"{count} {reason}" for reason, count in meta["dropped"].items())
        + "\n"
    )
    return 0


def _source(text: str) -> SourceConfig:
    if text in SOURCES:
        return source_config(SOURCES[text], text)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"source {text!r} is not YAML") from error
    if not isinstance(raw, dict):
        raise DataError(
            f"source {text!r}: give one of {', '.join(SOURCES)}, or '{{kind: jsonl, path: FILE}}'"
        )
    config = source_config(expand(raw, "source"), "source")
    if isinstance(config, ArithSourceConfig) and "num" not in raw:
        raise DataError("source: arith has no end; give num")
    return config


def _formatter(options: argparse.Namespace) -> Formatter:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"--tokenizer {options.tokenizer}: cannot be loaded ({reason})") from error
    template = read_chat_template(tokenizer, options.chat_template)
    return Formatter(tokenizer, chat_template=template, date=options.date)


if __name__ == "__main__":
    sys.exit(main())
