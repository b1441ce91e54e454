"""The progress line of a sampling session: samples, tokens per second, time left."""

import time
from typing import TextIO


class Progress:
    """Writes one line that renews itself on a terminal, and a line now and then elsewhere."""

    def __init__(self, total: int, done: int, stream: TextIO) -> None:
        """See the class.

        Args:
            total: samples asked for.
            done: those that earlier sessions drew.
            stream: usually stderr.
        """
        self.total = total
        self.done = done
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.interval_s = 0.5 if self.is_terminal else 10.0
        self._open: tuple[int, int] | None = None
        self._drawn = 0
        self._tokens = 0
        self._started = time.monotonic()
        self._shown = self._started
        self._width = 0

    def start(self) -> None:
        """Begin counting time; start-up and warm-up lie before."""
        self._started = self._shown = time.monotonic()

    def add(self, num_tokens: int) -> None:
        """Count one finished sample."""
        self.done += 1
        self._drawn += 1
        self._tokens += num_tokens

    def bound(self, total: int, num_open: int, num_problems: int) -> None:
        """Say how far early stops have come; the total is then the most that can be drawn.

        Args:
            total: samples in the end if no open problem is decided.
            num_open: problems whose vote is not decided.
            num_problems: of the session.
        """
        self.total = total
        self._open = (num_open, num_problems)

    @property
    def samples(self) -> str:
        """How many samples are there, and how many there will be or can be."""
        return f"{self.done} of {self._most}{self.total} samples"

    @property
    def _most(self) -> str:
        """What marks a number as a bound: a vote may still be decided."""
        return "at most " if self._open and self._open[0] else ""

    def show(self) -> None:
        """Renew the line if it is due."""
        if time.monotonic() - self._shown >= self.interval_s:
            self._write()

    def end(self) -> None:
        """Write the last state, and on a terminal end the line."""
        self._write()
        if self.is_terminal:
            self.stream.write("\n")
            self.stream.flush()

    def _write(self) -> None:
        self._shown = time.monotonic()
        line = self._line(self._shown - self._started)
        if self.is_terminal:
            # The cursor goes back, so that an error message never starts behind the line.
            self.stream.write(line.ljust(self._width) + "\r")
            self._width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def _line(self, elapsed_s: float) -> str:
        rate = self._tokens / elapsed_s if elapsed_s > 0 else 0.0
        most = self._most
        parts = [f"{self.done}/{most}{self.total} samples"]
        if self._open is not None:
            parts.append(f"{self._open[0]} of {self._open[1]} problems open")
        parts.append(f"{rate:.0f} tokens/s")
        left = self.total - self.done
        if left and self._drawn:
            parts.append(f"{most}{_clock(left * elapsed_s / self._drawn)} left")
            if most:
                # Fewer open problems than places in the batch are slower, too.
                parts[-1] += " at this speed"
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
