"""Pre-tokenised documents on disk: a folder that is written once and then only mapped.

``tokens.u32``      all token ids, uint32, one document after the other
``offsets.i64``     first token of each document and the end, int64, one more than documents
``completion.u8``   1 where the assistant speaks; absent for raw text
``meta.json``       counts, and fingerprints of tokenizer, chat template and evaluation problems
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import Formatter, Tokenised

FORMAT_VERSION = 1
TOKENS, OFFSETS, COMPLETION, META = "tokens.u32", "offsets.i64", "completion.u8", "meta.json"


class MemmapReader:
    """Documents of a folder."""

    def __init__(self, folder: Path, formatter: Formatter) -> None:
        """Maps the files.

        Args:
            folder: written by ``python -m thinkfast_distill.data.tokenise``.
            formatter: the run's; the folder must have been made with the same.

        Raises:
            DataError: no such folder, incomplete, of another tokenizer or another chat template.
        """
        self.meta = read_meta(folder)
        self._folder = folder
        self._check(folder, formatter)
        self._offsets: NDArray[np.int64] = np.fromfile(folder / OFFSETS, dtype=np.int64)
        self._tokens: NDArray[np.uint32] = np.memmap(folder / TOKENS, dtype=np.uint32, mode="r")
        self._completion: NDArray[np.uint8] | None = None
        if self.meta["layout"] != "text":
            self._completion = np.memmap(folder / COMPLETION, dtype=np.uint8, mode="r")

    def _check(self, folder: Path, formatter: Formatter) -> None:
        meta = self.meta
        if meta["tokenizer"] != formatter.fingerprint:
            raise DataError(
                f"{folder} was made with another tokenizer ({meta['tokenizer']}, the run's is "
                f"{formatter.fingerprint}); tokenise again"
            )
        if meta["layout"] != "text" and meta["chat_template"] != formatter.template_fingerprint:
            raise DataError(
                f"{folder} was made with another chat template or date; tokenise again, or give "
                "the run the same chat_template"
            )
        sizes = {
            TOKENS: 4 * meta["num_tokens"],
            OFFSETS: 8 * (meta["num_documents"] + 1),
            **({} if meta["layout"] == "text" else {COMPLETION: meta["num_tokens"]}),
        }
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise DataError(f"{file} should have {size} bytes; copy or tokenise it again")

    def check_decontamination(self, fingerprint: str) -> None:
        """Refuses a folder that was not decontaminated against the run's evaluation problems.

        Its documents are tokens, in which the problems could not be found any more.

        Args:
            fingerprint: of the run's `Decontaminator`.

        Raises:
            DataError: it was made without decontamination, or against other problems.
        """
        made = self.meta.get("decontamination")
        if made is None or made["fingerprint"] != fingerprint:
            how = "without decontamination" if made is None else "against other problems"
            raise DataError(
                f"{self._folder} was made {how}, but the mixture has decontaminate; tokenise again "
                "with --decontaminate and the same files"
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the description: source, settings and counts."""
        text = json.dumps(self.meta, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def num_tokens(self, index: int) -> int:
        """Length of a document in tokens."""
        return int(self._offsets[index + 1] - self._offsets[index])

    def document(self, index: int) -> Tokenised:
        """The document, copied out of the map."""
        part = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        tokens = np.array(self._tokens[part])
        if self._completion is None:
            return Tokenised(tokens, np.ones(len(tokens), dtype=np.bool_))
        return Tokenised(tokens, np.array(self._completion[part], dtype=np.bool_))


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of a folder.

    Raises:
        DataError: there is none, or of another version.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{folder} has no {META}; need a folder written by python -m "
            "thinkfast_distill.data.tokenise"
        ) from error
    except ValueError as error:
        raise DataError(f"{folder / META} is not JSON ({error})") from error
    if not isinstance(meta, dict) or meta.get("version") != FORMAT_VERSION:
        raise DataError(f"{folder / META} has not the format version {FORMAT_VERSION}")
    return meta
