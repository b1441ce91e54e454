"""Packs documents into rows of a fixed length without cutting what fits into a row.

Each piece goes into the fullest row that has room for it (best fit). A piece that fits nowhere
waits for the next batch, where the waiting ones come first; so nothing is lost and nothing that
fits into a row is cut. A batch is closed when every row is full, or when ``max_waiting`` pieces
wait.
"""

from collections.abc import Callable, Sequence

from thinkfast_distill.data.mixing import Piece

#: Room in a row that is not worth reading on for, as a part of the row.
_SLACK = 1 / 256


class Packer:
    """Fills batches of rows; remembers the pieces that wait."""

    def __init__(self, num_rows: int, seq_len: int, max_waiting: int | None = None) -> None:
        """Starts with nothing waiting.

        Args:
            num_rows: rows of a batch.
            seq_len: tokens of a row.
            max_waiting: pieces that may wait; None for a number that keeps padding near 1%.
        """
        self.num_rows, self.seq_len = num_rows, seq_len
        self.max_waiting = max_waiting or max(8, num_rows)
        self.waiting: list[Piece] = []

    def pack(self, draw: Callable[[], Sequence[Piece]]) -> list[list[Piece]]:
        """The rows of the next batch.

        Args:
            draw: the pieces of the next document, none when there are no more.

        Returns:
            ``num_rows`` lists of pieces of together at most ``seq_len`` tokens; all empty when
            there is nothing left.
        """
        rows: list[list[Piece]] = [[] for _ in range(self.num_rows)]
        room = [self.seq_len] * self.num_rows
        self.waiting = [piece for piece in self.waiting if not _place(piece, rows, room)]
        while len(self.waiting) < self.max_waiting and max(room) > self.seq_len * _SLACK:
            pieces = draw()
            if not pieces:
                break
            self.waiting += [piece for piece in pieces if not _place(piece, rows, room)]
        return rows


def _place(piece: Piece, rows: list[list[Piece]], room: list[int]) -> bool:
    """Puts the piece into the fullest row with room for it; False if there is none."""
    fitting = [i for i, free in enumerate(room) if free >= piece.length]
    if not fitting:
        return False
    best = min(fitting, key=lambda i: (room[i], i))
    rows[best].append(piece)
    room[best] -= piece.length
    return True
