"""Prepares batches ahead in a thread, each with the loader's state after it.

The state travels with its batch: a checkpoint must hold the state after the last batch that was
trained on, not after the last one that was prepared.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinkfast_distill.batch import PackedBatch
    from thinkfast_distill.data.loader import Loader


class Feed:
    """An iterator over one rank's part of the global batches."""

    def __init__(self, loader: Loader, rank: int, world_size: int, ahead: int) -> None:
        """Starts preparing.

        Args:
            loader: used by this object alone from now on.
            rank: which rows of each global batch.
            world_size: number of ranks.
            ahead: batches prepared in advance; 0 prepares each when it is asked for.
        """
        self._loader = loader
        self._rank, self._world_size = rank, world_size
        self._queue: queue.Queue[tuple[PackedBatch, dict[str, Any]] | BaseException] | None = None
        self._stopped = threading.Event()
        if ahead > 0:
            self._queue = queue.Queue(maxsize=ahead)
            self._thread = threading.Thread(target=self._work, name="data-feed", daemon=True)
            self._thread.start()

    def next(self) -> tuple[PackedBatch, dict[str, Any]]:
        """The next batch, and the loader's state after it.

        Raises:
            DataError: what the loader raised.
        """
        if self._queue is None:
            return self._prepare()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def report(self, state: dict[str, Any]) -> dict[str, Any]:
        """What was read up to a state, see ``Loader.report``."""
        return self._loader.report(state)

    def close(self) -> None:
        """Stops the thread."""
        self._stopped.set()
        if self._queue is not None:
            while self._thread.is_alive():
                try:
                    self._queue.get(timeout=0.05)  # it may wait for room
                except queue.Empty:
                    continue

    def _prepare(self) -> tuple[PackedBatch, dict[str, Any]]:
        batch = self._loader.next(self._rank, self._world_size)
        return batch, self._loader.state()

    def _work(self) -> None:
        assert self._queue is not None
        while not self._stopped.is_set():
            try:
                self._queue.put(self._prepare())
            except BaseException as error:  # handed over to the thread that trains
                self._queue.put(error)
                return
