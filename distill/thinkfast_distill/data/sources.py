"""Where documents come from: JSON lines, parquet, pre-tokenised memmaps, the hub, ``arith``.

A source returns the document at (epoch, position). All but the hub's streams have random access, so
the order is a permutation by seed, source name and epoch (`order.Permutation`).

Limitation of ``hub``: a stream can only be read forwards. Its order is the data set's own, permuted
inside windows of ``shuffle_window`` records, and a resumed run reads the stream up to its window
again, which takes as long as the download did. For long runs tokenise first
(``python -m thinkfast_distill.data.tokenise``).
"""

import functools
import glob
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from thinkfast_distill.data.arith_records import (
    ArithRecords,
    ArithSampleRecords,
    ArithStepRecords,
)
from thinkfast_distill.data.decontaminate import Decontaminator
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import Formatter, RecordFormat, Tokenised
from thinkfast_distill.data.memmap import META, MemmapReader
from thinkfast_distill.data.order import Permutation
from thinkfast_distill.data.source_config import (
    ArithSourceConfig,
    FileSourceConfig,
    HubSourceConfig,
    MemmapSourceConfig,
    SourceConfig,
    source_config,
)

# -- documents ------------------------------------------------------------------------------------


class Document:
    """One document of a source; tokenised when its tokens or its length are asked for."""

    def __init__(
        self,
        name: str,
        tokenise: Callable[[], Tokenised],
        *,
        texts: Sequence[str] | None = None,
        num_tokens: int | None = None,
    ) -> None:
        """Keeps the way to the tokens.

        Args:
            name: ``source:index``.
            tokenise: makes the tokens.
            texts: its turns, for decontamination; None where that was done before (memmaps).
            num_tokens: its length if it is known without tokenising.
        """
        self.name = name
        self.texts = texts
        self._tokenise = tokenise
        self._num_tokens = num_tokens
        self._tokenised: Tokenised | None = None

    @property
    def tokenised(self) -> Tokenised:
        """Tokens and completion mask."""
        if self._tokenised is None:
            self._tokenised = self._tokenise()
        return self._tokenised

    def __len__(self) -> int:
        return len(self.tokenised.tokens) if self._num_tokens is None else self._num_tokens


class Source(Protocol):
    """Documents by epoch and position."""

    name: str

    contents: Mapping[str, Any]
    """What the order rests on besides the settings, JSON-able: a run must not be continued with
    another one. Empty for streams, which do not know it."""

    def fetch(self, epoch: int, position: int) -> Document | None:
        """The document at a position of a pass, or None if the pass has ended before."""


class Records(Protocol):
    """Records with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    def place(self, index: int) -> str:
        """File and line (or row) of a record, for messages."""


class RecordSource:
    """A source over records with random access."""

    def __init__(
        self,
        name: str,
        records: Records,
        record_format: RecordFormat,
        formatter: Formatter,
        seed: int,
    ) -> None:
        """Checks the first record, so that a wrong field is reported before training starts."""
        self.name = name
        self.contents: Mapping[str, Any] = {"records": len(records)}
        self._records, self._format, self._formatter = records, record_format, formatter
        self._order = functools.lru_cache(2)(
            lambda epoch: Permutation(len(records), seed, name, epoch)
        )
        _ = self._document(0).tokenised

    def fetch(self, epoch: int, position: int) -> Document | None:
        """See `Source`."""
        if position >= len(self._records):
            return None
        return self._document(self._order(epoch)[position])

    def _document(self, index: int) -> Document:
        return _record_document(
            f"{self.name}:{index}",
            self._records[index],
            self._format,
            self._formatter,
            lambda: self._records.place(index),
        )


def _record_document(
    name: str,
    record: Mapping[str, Any],
    record_format: RecordFormat,
    formatter: Formatter,
    place: Callable[[], str],
) -> Document:
    try:
        turns = record_format.texts(record)
    except DataError as error:
        raise DataError(f"{place()}: {error}") from error

    def tokenise() -> Tokenised:
        try:
            return formatter.tokenise(turns)
        except DataError as error:
            raise DataError(f"{place()}: {error}") from error

    return Document(name, tokenise, texts=[content for _, content in turns])


# -- kinds ----------------------------------------------------------------------------------------


class JsonlRecords:
    """Lines of JSON lines files, found by their byte offsets: 8 bytes of memory per line."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Scans the files once.

        Raises:
            DataError: a file cannot be read, or has no line that is not empty.
        """
        self._files = list(files)
        self._offsets = array("q")
        self._first: list[int] = []
        for file in self._files:
            self._first.append(len(self._offsets))
            try:
                with file.open("rb") as lines:
                    at = 0
                    for line in lines:
                        if not line.isspace():
                            self._offsets.append(at)
                        at += len(line)
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({error.strerror})") from error
            if len(self._offsets) == self._first[-1]:
                raise DataError(f"{file}: the file is empty; need one JSON object per line")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The record.

        Raises:
            DataError: the file cannot be read any more, or the line is not a JSON object.
        """
        file = self._file(index)
        try:
            with file.open("rb") as lines:
                lines.seek(self._offsets[index])
                line = lines.readline()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.place(index)}: not JSON ({error.msg} at column {error.colno}); need one "
                "JSON object per line"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(index)}: not UTF-8 ({error.reason})") from error
        if not isinstance(record, dict):
            raise DataError(f"{self.place(index)}: need a JSON object, got {type(record).__name__}")
        return record

    def place(self, index: int) -> str:
        """``file:line``."""
        file = self._file(index)
        with file.open("rb") as text:
            line = 1 + sum(1 for _ in _lines_before(text, self._offsets[index]))
        return f"{file}:{line}"

    def _file(self, index: int) -> Path:
        return self._files[bisect_right(self._first, index) - 1]


def _lines_before(text: Any, offset: int) -> Iterator[bytes]:
    at = 0
    while at < offset:
        line = text.readline()
        at += len(line)
        yield line


class ParquetRecords:
    """Rows of parquet files, of which the needed columns are kept in memory."""

    def __init__(self, files: Sequence[Path], columns: Sequence[str]) -> None:
        """Reads the columns.

        Raises:
            DataError: a file is not parquet, lacks a column, or has no rows.
        """
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError(
                "reading parquet needs pyarrow: pip install 'thinkfast-distill[data]'"
            ) from error
        self._files = list(files)
        self._tables: list[Any] = []
        self._first: list[int] = []
        total = 0
        for file in self._files:
            try:
                names = parquet.read_schema(file).names
                missing = [column for column in columns if column not in names]
                if missing:
                    raise DataError(
                        f"{file}: no field {missing[0]!r}; the fields are "
                        f"{', '.join(map(repr, names))}"
                    )
                table = parquet.read_table(file, columns=list(columns), memory_map=True)
            except (OSError, pyarrow.ArrowException) as error:
                reason = str(error).split("\n")[0]
                raise DataError(f"{file}: cannot be read as parquet ({reason})") from error
            if not table.num_rows:
                raise DataError(f"{file}: the file has no rows")
            self._first.append(total)
            self._tables.append(table)
            total += table.num_rows
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The row."""
        at = bisect_right(self._first, index) - 1
        row: dict[str, Any] = self._tables[at].slice(index - self._first[at], 1).to_pylist()[0]
        return row

    def place(self, index: int) -> str:
        """``file:row``, counted from 1."""
        at = bisect_right(self._first, index) - 1
        return f"{self._files[at]}:{index - self._first[at] + 1}"


class MemmapSource:
    """A source over a pre-tokenised folder."""

    def __init__(self, name: str, reader: MemmapReader, seed: int) -> None:
        self.name = name
        self.contents: Mapping[str, Any] = {"documents": len(reader), "folder": reader.fingerprint}
        self._reader = reader
        self._order = functools.lru_cache(2)(
            lambda epoch: Permutation(len(reader), seed, name, epoch)
        )

    def fetch(self, epoch: int, position: int) -> Document | None:
        """See `Source`."""
        if position >= len(self._reader):
            return None
        index = self._order(epoch)[position]
        return Document(
            f"{self.name}:{index}",
            lambda: self._reader.document(index),
            num_tokens=self._reader.num_tokens(index),
        )


class StreamSource:
    """A source over a stream that can only be read forwards from a given record."""

    def __init__(
        self,
        name: str,
        open_at: Callable[[int], Iterator[Mapping[str, Any]]],
        record_format: RecordFormat,
        formatter: Formatter,
        seed: int,
        window: int,
        first_record: int = 0,
    ) -> None:
        """Opens nothing yet.

        Args:
            name: label.
            open_at: starts the stream at a record; it leaves out ``first_record`` records itself.
            record_format: fields.
            formatter: makes tokens.
            seed: of the order inside windows.
            window: records read at once.
            first_record: number of the first record, for the names of documents.
        """
        if window < 1:
            raise DataError(f"source {name}: shuffle_window: {window} must be at least 1")
        self.name = name
        self.contents: Mapping[str, Any] = {}
        self._open_at, self._format, self._formatter = open_at, record_format, formatter
        self._seed, self._window, self._first_record = seed, window, first_record
        self._stream: Iterator[Mapping[str, Any]] | None = None
        self._block = -1
        self._records: list[Mapping[str, Any]] = []

    def fetch(self, epoch: int, position: int) -> Document | None:
        """See `Source`."""
        block, offset = divmod(position, self._window)
        if block != self._block:
            self._read(block)
        if offset >= len(self._records):
            return None
        order = Permutation(len(self._records), self._seed, self.name, epoch, block)
        at = order[offset]
        index = self._first_record + block * self._window + at
        name = f"{self.name}:{index}"
        return _record_document(
            name, self._records[at], self._format, self._formatter, lambda: f"record {name}"
        )

    def _read(self, block: int) -> None:
        try:
            if self._stream is None or block != self._block + 1:
                self._stream = self._open_at(block * self._window)
            self._records = list(islice(self._stream, self._window))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise DataError(
                f"source {self.name}: cannot be read from the hub ({reason})"
            ) from error
        self._block = block


def _hub_stream(config: HubSourceConfig) -> Callable[[int], Iterator[Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "kind: hub needs the datasets library: pip install 'thinkfast-distill[data]'"
        ) from error

    def open_at(first: int) -> Iterator[Mapping[str, Any]]:
        stream = datasets.load_dataset(
            config.dataset,
            config.config,
            split=config.split,
            revision=config.revision,
            data_files=config.data_files,
            streaming=True,
        )
        first += config.skip
        return iter(stream.skip(first) if first else stream)

    return open_at


def _files(config: FileSourceConfig) -> list[Path]:
    found: list[Path] = []
    for pattern in [config.path] if isinstance(config.path, str) else config.path:
        names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not names:
            raise DataError(f"path: no file matches {pattern!r}")
        found += [Path(name) for name in names]
    for file in found:
        if not file.is_file():
            raise DataError(f"path: {file} is not a file")
    return found


def open_source(
    config: SourceConfig,
    formatter: Formatter,
    seed: int,
    decontaminator: Decontaminator | None = None,
) -> Source:
    """Opens a source.

    Args:
        config: what and where.
        formatter: makes tokens; a memmap must have been made with the same.
        seed: of the order.
        decontaminator: of the mixture, or None; a memmap, which holds no texts to look at, must
            have been made with the same.

    Raises:
        DataError: the source cannot be used; the message names it.
    """
    try:
        return _open(config, formatter, seed, decontaminator)
    except DataError as error:
        raise DataError(f"source {config.label}: {error}") from error


def _open(
    config: SourceConfig, formatter: Formatter, seed: int, decontaminator: Decontaminator | None
) -> Source:
    name = config.label
    if isinstance(config, MemmapSourceConfig):
        return _open_memmap(config, formatter, seed, decontaminator)
    if isinstance(config, HubSourceConfig):
        return StreamSource(
            name,
            _hub_stream(config),
            config.format(),
            formatter,
            seed,
            config.shuffle_window,
            config.skip,
        )
    return RecordSource(name, *_records(config), formatter, seed)


def _open_memmap(
    config: MemmapSourceConfig,
    formatter: Formatter,
    seed: int,
    decontaminator: Decontaminator | None,
) -> MemmapSource:
    reader = MemmapReader(Path(config.path), formatter)
    if decontaminator is not None:
        reader.check_decontamination(decontaminator.fingerprint)
    made_from = source_config(reader.meta["source"], f"{config.path}/{META}: source")
    has_labels = made_from.has_step_labels
    # As the recipe must write it; whoever reads the recipe alone must know what is learned.
    wanted = {
        "step_labels": has_labels,
        "learn_steps": has_labels and bool(getattr(made_from, "learn_steps", False)),
    }
    for key, value in wanted.items():
        if getattr(config, key) != value:
            what = "conversations with step labels" if has_labels else "no step labels"
            raise DataError(
                f"{key}: {str(getattr(config, key)).lower()}, but {config.path} was made of {what} "
                f"with {key}: {str(value).lower()}; write that in the recipe"
            )
    return MemmapSource(config.label, reader, seed)


def _records(config: SourceConfig) -> tuple[Records, RecordFormat]:
    """The records of a source with random access."""
    if isinstance(config, ArithSourceConfig):
        if config.has_step_labels:
            record_format = RecordFormat(
                layout="steps",
                question_field="" if config.single_steps else "question",
                last_step=config.last_step,
                learn_steps=config.learn_steps,
            )
            if config.samples is None:
                return ArithStepRecords(config), record_format
            rows = JsonlRecords([Path(config.samples)])
            return ArithSampleRecords(rows, config.split), record_format
        return ArithRecords(config), ArithRecords.FORMAT
    assert isinstance(config, FileSourceConfig)
    record_format = config.format()
    if config.kind == "parquet":
        return ParquetRecords(_files(config), record_format.fields), record_format
    return JsonlRecords(_files(config)), record_format


def read_in_order(config: SourceConfig, formatter: Formatter, first: int = 0) -> Iterator[Document]:
    """The documents of a source in its own order, once, from record ``first`` on.

    Raises:
        DataError: the source cannot be used, or a record.
    """
    if isinstance(config, HubSourceConfig):
        stream = _hub_stream(config)(first)
        for at, record in enumerate(stream, start=config.skip + first):
            name = f"{config.label}:{at}"
            yield _record_document(name, record, config.format(), formatter, name.__str__)
        return
    records, record_format = _records(config)
    for at in range(first, len(records)):
        yield _record_document(
            f"{config.label}:{at}",
            records[at],
            record_format,
            formatter,
            functools.partial(records.place, at),
        )
