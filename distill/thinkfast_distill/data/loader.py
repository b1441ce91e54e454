"""Global batches of packed rows, as a function of configuration, seed and step alone.

Every rank draws and packs the same documents and makes tensors of its own rows only. So the state
is the same on all ranks, small, and independent of their number. The price: text that is tokenised
on the fly is tokenised by every rank; runs with many ranks should read memmaps, whose packing needs
only the document lengths.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinkfast_distill.batch import PackedBatch
from thinkfast_distill.data.decontaminate import Decontaminator
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import DEFAULT_DATE, Formatter
from thinkfast_distill.data.mixing import Mixture, Piece
from thinkfast_distill.data.packing import Packer
from thinkfast_distill.data.source_config import LossOn, SourceConfig, source_config
from thinkfast_distill.data.sources import open_source
from thinkfast_distill.recipe import NEW_RUN

STATE_VERSION = 1


class Loader:
    """The batches of a mixture."""

    def __init__(
        self,
        sources: Sequence[Mapping[str, Any] | SourceConfig],
        tokenizer: Any,
        seq_len: int,
        batch_rows_global: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
        *,
        loss_on: LossOn = "all",
        chat_template: str | None = None,
        date: str = DEFAULT_DATE,
        max_document_tokens: int | None = None,
        decontaminate: Sequence[str | Path] = (),
    ) -> None:
        """Opens the sources.

        Args:
            sources: see `data.sources`; mappings from a recipe or configs.
            tokenizer: a Hugging Face tokenizer; it is not changed.
            seq_len: tokens of a row, L.
            batch_rows_global: rows of a batch over all ranks.
            seed: of the order.
            state: continue from here, see `state`.
            loss_on: which tokens are targets, unless a source says otherwise.
            chat_template: Jinja source; None for the tokenizer's own. `chat_template` has the one
                in force.
            date: shown by templates that show one.
            max_document_tokens: longer documents are dropped and counted.
            decontaminate: JSON lines files of evaluation problems.

        Raises:
            DataError: a source or option cannot be used, or the state is of another configuration.
        """
        if not sources:
            raise DataError("sources: the list is empty; need at least one")
        if seq_len < 2 or batch_rows_global < 1:
            raise DataError(
                f"seq_len={seq_len} must be at least 2, batch rows={batch_rows_global} at least 1"
            )
        if loss_on not in ("all", "completion"):
            raise DataError(f"loss_on: {loss_on!r} is not accepted; accepted: all, completion")
        self._formatter = Formatter(tokenizer, chat_template=chat_template, date=date)
        pad = getattr(tokenizer, "pad_token_id", None)
        self._pad: int = self._formatter.eos if pad is None else pad
        self._configs = [source_config(raw, f"sources.{i}") for i, raw in enumerate(sources)]
        self._loss_on = [config.loss_on or loss_on for config in self._configs]
        self._decontaminator = Decontaminator.from_files(decontaminate) if decontaminate else None
        self._mixture = Mixture(
            self._configs,
            [
                open_source(config, self._formatter, seed, self._decontaminator)
                for config in self._configs
            ],
            max_piece_tokens=seq_len,
            max_document_tokens=max_document_tokens,
            decontaminator=self._decontaminator,
        )
        self._packer = Packer(batch_rows_global, seq_len)
        self._step = 0
        others = [
            [seq_len, batch_rows_global, seed, self._loss_on, max_document_tokens],
            [self._formatter.fingerprint, self._formatter.template_fingerprint],
            None if self._decontaminator is None else self._decontaminator.fingerprint,
        ]
        # Passes decide when a source ends, not what comes before its end, so a run may go on with
        # more of them. They count as 1, the default, so that most older states still compare equal.
        sources_given = [{**config.settings(), "label": config.label} for config in self._configs]
        self.fingerprint = _hash([[{**one, "epochs": 1} for one in sources_given], *others])
        """A hash of everything that decides the batches, as long as no source ends."""
        # Earlier versions saved the second one.
        self._fingerprints = (self.fingerprint, _hash([sources_given, *others]))
        if state is not None:
            self.load_state(state)

    @property
    def chat_template(self) -> str | None:
        """The template in force, dates pinned: what the exported model must carry."""
        return self._formatter.chat_template

    def next(self, rank: int = 0, world_size: int = 1) -> PackedBatch:
        """The rows ``rank::world_size`` of the next global batch.

        When the budgets end inside a batch, its last rows are padding.

        Raises:
            DataError: no data is left, a source ended early, or a record cannot be used.
        """
        if not 0 <= rank < world_size or self._packer.num_rows % world_size:
            raise DataError(
                f"{self._packer.num_rows} rows per batch cannot be shared by {world_size} ranks "
                f"(rank {rank}); choose batch_tokens so that the rows are a multiple of the ranks"
            )
        rows = self._packer.pack(self._mixture.draw)
        if not any(rows):
            used = sum(state.tokens for state in self._mixture.states)
            raise DataError(
                f"the token budgets of all sources ({used} tokens) are used after {self._step} "
                "batches; raise tokens of the sources, or lower those of the stage, in "
                f"{NEW_RUN}"
            )
        self._step += 1
        return self._batch(rows[rank::world_size])

    def _batch(self, rows: Sequence[Sequence[Piece]]) -> PackedBatch:
        shape = (len(rows), self._packer.seq_len)
        input_ids = np.full(shape, self._pad, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        document_ids = np.full(shape, -1, dtype=np.int32)
        loss_mask = np.zeros(shape, dtype=np.bool_)
        source_tokens = {config.label: 0 for config in self._configs}
        for b, row in enumerate(rows):
            at = 0
            for d, piece in enumerate(row):
                here = slice(at, at + piece.length)
                part = slice(piece.start, piece.start + piece.length)
                tokenised = piece.document.tokenised
                input_ids[b, here] = tokenised.tokens[part]
                position_ids[b, here] = np.arange(piece.length)
                document_ids[b, here] = d
                is_all = self._loss_on[piece.source] == "all"
                loss_mask[b, here] = True if is_all else tokenised.completion[part]
                source_tokens[self._configs[piece.source].label] += piece.length
                at += piece.length
            # A model that ignores document_ids on padding still sees increasing positions.
            position_ids[b, at:] = np.arange(shape[1] - at)
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(position_ids),
            document_ids=torch.from_numpy(document_ids),
            loss_mask=torch.from_numpy(loss_mask),
            sample_ids=[[piece.name for piece in row] for row in rows],
            source_tokens=source_tokens,
        )

    def state(self) -> dict[str, Any]:
        """What is needed to continue after the batches given out so far, with any world size."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "step": self._step,
            "sources": self._mixture.state(),
            "waiting": [piece.reference() for piece in self._packer.waiting],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`.

        Raises:
            DataError: the state is of another version or of other data, tokenizer or batch sizes.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(f"data state: version {state.get('version')}, need {STATE_VERSION}")
        if state["fingerprint"] not in self._fingerprints:
            raise DataError(
                "data state: it was saved with other sources, seed, tokenizer, chat template, "
                "seq_len or batch rows; continue with the same, or start a new run folder"
            )
        self._step = state["step"]
        self._mixture.load_state(state["sources"])
        self._packer.waiting = [self._mixture.restore(entry) for entry in state["waiting"]]

    def report(self, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What was read, for the run's record: per source and in total, JSON-able.

        Args:
            state: up to this `state`; None: up to now.
        """
        sources = self._mixture.state() if state is None else state["sources"]
        total = sum(one["tokens"] for one in sources)
        known = self._decontaminator
        return {
            "sources": [
                {key: one[key] for key in ("name", "documents", "tokens", "epoch", "dropped")}
                | {"share": one["tokens"] / total if total else 0.0}
                for one in sources
            ],
            "tokens": total,
            "fingerprint": self.fingerprint,
            "decontamination": None
            if known is None
            else {"problems": known.num_problems, "fingerprint": known.fingerprint},
        }


def _hash(settings: Any) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
