"""Mixes sources by tokens: the next document comes from the source that is furthest behind.

A deficit counter instead of random draws, and tokens instead of documents: a FineMath page has
about four times the tokens of an OpenMathInstruct-2 solution, so 1:1 by document would be 4:1 by
token. At any moment a source is at most one document away from its share. A budget is met exactly:
the last document of a source is cut where its budget ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from thinkfast_distill.data.decontaminate import Decontaminator
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.source_config import SourceConfig
from thinkfast_distill.data.sources import Document, Source
from thinkfast_distill.recipe import NEW_RUN


@dataclass(frozen=True)
class Piece:
    """Part of a document that fits into one row."""

    document: Document
    """The document."""

    source: int
    """Index of its source in the mixture."""

    epoch: int
    """Pass over the source."""

    position: int
    """Position in the pass."""

    start: int
    """First token of the document that belongs to the piece."""

    length: int
    """Tokens."""

    @property
    def name(self) -> str:
        """``source:index``, and ``+first token`` for a part that was carried over."""
        return self.document.name + (f"+{self.start}" if self.start else "")

    def reference(self) -> list[int]:
        """What is needed to make the piece again, JSON-able."""
        return [self.source, self.epoch, self.position, self.start, self.length]


@dataclass
class SourceState:
    """How far a source has been read."""

    epoch: int = 0
    """Pass over the documents, from 0."""

    position: int = 0
    """Next position in the pass, dropped documents included."""

    documents: int = 0
    """Documents used."""

    tokens: int = 0
    """Tokens used."""

    dropped: dict[str, int] = field(default_factory=lambda: {"exact": 0, "ngram": 0, "long": 0})
    """Documents left out: equal to an evaluation problem, overlapping with one, too long."""

    last_used: int = 0
    """Documents used up to the end of the previous pass; a pass without any is an error."""


class Mixture:
    """An endless (or budgeted) stream of pieces from several sources."""

    def __init__(
        self,
        configs: Sequence[SourceConfig],
        sources: Sequence[Source],
        *,
        max_piece_tokens: int,
        max_document_tokens: int | None = None,
        decontaminator: Decontaminator | None = None,
    ) -> None:
        """Starts at the beginning.

        Args:
            configs: budgets, weights and passes.
            sources: the opened sources, in the same order.
            max_piece_tokens: longer documents come in several pieces, one after the other.
            max_document_tokens: longer documents are left out; None for none.
            decontaminator: documents in which it finds something are left out.

        Raises:
            DataError: budgets and weights are mixed, or two sources have one name.
        """
        self._configs, self._sources = list(configs), list(sources)
        self._max_piece, self._max_document = max_piece_tokens, max_document_tokens
        self._decontaminator = decontaminator
        self.states = [SourceState() for _ in sources]
        labels = [config.label for config in configs]
        for label in labels:
            if labels.count(label) > 1:
                raise DataError(f"two sources are named {label!r}; give each a name")
        with_budget = [config.label for config in configs if config.tokens is not None]
        if with_budget and len(with_budget) < len(labels):
            missing = next(label for label in labels if label not in with_budget)
            raise DataError(
                f"source {missing}: no tokens, but {with_budget[0]} has; give tokens for all "
                "sources of a mixture, or weight"
            )
        self._shares = [float(config.tokens or config.weight or 1.0) for config in configs]

    def draw(self) -> list[Piece]:
        """The pieces of the next document, in order; empty when every budget is used.

        Raises:
            DataError: a source ended before its budget, or has a record that cannot be used.
        """
        while True:
            index = self._next_source()
            if index is None:
                return []
            state, config = self.states[index], self._configs[index]
            document = self._sources[index].fetch(state.epoch, state.position)
            if document is None:
                self._next_epoch(index)
                continue
            place = (index, state.epoch, state.position)
            state.position += 1
            reason = self._reason_to_drop(document)
            if reason is not None:
                state.dropped[reason] += 1
                continue
            length = len(document)
            if config.tokens is not None:
                length = min(length, config.tokens - state.tokens)
            state.documents += 1
            state.tokens += length
            return [
                Piece(document, *place, start, min(self._max_piece, length - start))
                for start in range(0, length, self._max_piece)
            ]

    def restore(self, reference: Sequence[int]) -> Piece:
        """Makes a piece again from `Piece.reference`."""
        source, epoch, position, start, length = reference
        document = self._sources[source].fetch(epoch, position)
        if document is None:
            raise DataError(
                f"source {self._sources[source].name}: document {position} of the saved state is "
                "gone; the data has changed since"
            )
        return Piece(document, source, epoch, position, start, length)

    def _next_source(self) -> int | None:
        waiting = [
            i
            for i, (config, state) in enumerate(zip(self._configs, self.states, strict=True))
            if config.tokens is None or state.tokens < config.tokens
        ]
        if not waiting:
            return None
        return min(waiting, key=lambda i: (self.states[i].tokens / self._shares[i], i))

    def _next_epoch(self, index: int) -> None:
        state, config = self.states[index], self._configs[index]
        dropped = sum(state.dropped.values())
        used = f"{state.documents} documents, {state.tokens} tokens"
        used += f" ({dropped} documents dropped)" if dropped else ""
        if state.documents == state.last_used:
            raise DataError(
                f"source {config.label}: a whole pass had no usable document; {used} so far"
            )
        state.epoch, state.position = state.epoch + 1, 0
        state.last_used = state.documents
        if config.epochs is not None and state.epoch >= config.epochs:
            wanted = "the run" if config.tokens is None else f"its budget of {config.tokens} tokens"
            raise DataError(
                f"source {config.label} ended before {wanted}: {used} in {state.epoch} pass(es); "
                "raise its epochs (null: any number of passes) and the same command continues; "
                f"fewer tokens need {NEW_RUN}"
            )

    def _reason_to_drop(self, document: Document) -> str | None:
        if self._max_document is not None and len(document) > self._max_document:
            return "long"
        if self._decontaminator is not None and document.texts is not None:
            return self._decontaminator.find(document.texts)
        return None

    def state(self) -> list[dict[str, Any]]:
        """Progress per source, JSON-able."""
        return [
            {
                "name": config.label,
                "epoch": state.epoch,
                "position": state.position,
                "documents": state.documents,
                "tokens": state.tokens,
                "dropped": dict(state.dropped),
                "last_used": state.last_used,
                "contents": dict(source.contents),
            }
            for config, state, source in zip(self._configs, self.states, self._sources, strict=True)
        ]

    def load_state(self, saved: Sequence[dict[str, Any]]) -> None:
        """Continues from `state`.

        Raises:
            DataError: a source does not hold what it held then, so its order would be another, or
                it has been read more often than ``epochs`` now allows.
        """
        for one, source in zip(saved, self._sources, strict=True):
            # Not there if an earlier version saved the state.
            before, now = one.get("contents"), dict(source.contents)
            if before is not None and before != now:
                key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
                raise DataError(
                    f"source {source.name}: its data has changed since the run was saved ({key}: "
                    f"then {before.get(key)}, now {now.get(key)}), so the rest would come in "
                    "another order; restore the data, or start a new run folder"
                )
        not_progress = ("name", "contents")
        self.states = [
            SourceState(**{key: value for key, value in one.items() if key not in not_progress})
            for one in saved
        ]
        for config, state in zip(self._configs, self.states, strict=True):
            state.dropped = dict(state.dropped)
            if config.epochs is not None and state.epoch >= config.epochs:
                raise DataError(
                    f"source {config.label}: epochs: {config.epochs}, but the run is in pass "
                    f"{state.epoch + 1} over it; give at least {state.epoch + 1}, or null"
                )
