"""A sampled text that still knows how it ended.

lm-eval hands `str` objects from the model class to the task and keeps nothing else. A subclass of
`str` travels through its filters, logs and caches unchanged, so token counts and finish reasons
reach the metrics (truncation rate, mean generated tokens) when the model class supplies them.
"""

import hashlib


class SampledText(str):
    """One sampled text.

    Attributes:
        num_tokens: generated tokens, the end-of-sequence token included.
        finish_reason: "stop" for a natural end, "length" for a text cut at the token limit.
    """

    num_tokens: int
    finish_reason: str | None

    def __new__(cls, text: str, num_tokens: int, finish_reason: str | None) -> "SampledText":
        """Build the text with its two facts."""
        self = super().__new__(cls, text)
        self.num_tokens = num_tokens
        self.finish_reason = finish_reason
        return self

    def __getnewargs__(self) -> tuple[str, int, str | None]:  # type: ignore[override]
        """Return the constructor's arguments, so that lm-eval's caches can pickle a sample."""
        return (str(self), self.num_tokens, self.finish_reason)

    @property
    def is_truncated(self) -> bool:
        """Whether the text was cut at the token limit."""
        return self.finish_reason == "length"


def sample_seed(run_seed: int, problem: str, index: int) -> int:
    """Return the seed of one sample: reproducible, and different for every sample of a run.

    Args:
        run_seed: the seed of the whole run.
        problem: a name of the problem that does not depend on which others are in the run.
        index: the sample's number within the problem.

    Returns:
        A non-negative integer below 2**63.
    """
    key = f"{run_seed}\x1f{problem}\x1f{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
