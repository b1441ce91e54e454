"""An order that is a function of the seed alone: a permutation computed index by index.

A Feistel network is a permutation of the numbers below a power of four; results outside the wanted
range are encrypted again until they fall inside (cycle walking, Black and Rogaway 2002). Nothing is
stored, so a run resumes at any position, and every epoch and source has its own order.
"""

import hashlib

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """A fixed pseudo-random permutation of ``range(size)``."""

    def __init__(self, size: int, *key: object) -> None:
        """Derives the round keys.

        Args:
            size: numbers to permute, at least 1.
            key: whatever the order depends on (seed, source, epoch); compared by ``str``.
        """
        if size < 1:
            raise ValueError(f"a permutation needs a size of at least 1, got {size}")
        self.size = size
        self._half_bits = max(1, -(-(size - 1).bit_length() // 2))
        self._half_mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """Returns the number at a position.

        Raises:
            IndexError: the position is outside ``range(size)``.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"position {index} of a permutation of {self.size}")
        value = self._encrypt(index)
        while value >= self.size:  # at most four tries on average
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
