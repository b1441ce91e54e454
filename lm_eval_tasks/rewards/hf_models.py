"""Reward models with a head on Qwen2, in Hugging Face layout, without code from the hub.

Two published classes exist only as remote code written for other versions of transformers:
``Qwen2ForProcessRewardModel`` of Qwen/Qwen2.5-Math-PRM-7B (``modeling_qwen2_rm.py``: a two-layer
head, its weights ``score.0.*`` and ``score.2.*``) and ``Qwen2ForPrmModel`` of the Skywork-o1 models
(https://github.com/SkyworkAI/skywork-o1-prm-inference: ``v_head.summary``, with a bias). Both read
the backbone's output after its final norm. The parameter names here are those of the files.

Shape letters: R rows (one per step), D hidden size.
"""

from typing import Any

from torch import Tensor, nn
from transformers import Qwen2Model, Qwen2PreTrainedModel


class _Qwen2WithHead(Qwen2PreTrainedModel):
    """The backbone as ``model``; subclasses add a head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.make_head(config.hidden_size)
        self.post_init()

    def make_head(self, hidden_size: int) -> None:
        raise NotImplementedError

    def log_odds(self, rows: Tensor) -> Tensor:
        """Return (R,) log-odds of a right step from (R, D) backbone outputs."""
        raise NotImplementedError


class Qwen2WithTwoLabels(_Qwen2WithHead):
    """Qwen2.5-Math-PRM: linear, ReLU, linear to two labels, of which label 1 means right."""

    def make_head(self, hidden_size: int) -> None:
        """Add the head."""
        self.score = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 2)
        )

    def log_odds(self, rows: Tensor) -> Tensor:
        """See `_Qwen2WithHead.log_odds`."""
        logits: Tensor = self.score(rows).float()
        return logits[:, 1] - logits[:, 0]


class Qwen2WithValue(_Qwen2WithHead):
    """Skywork-o1: linear to one value, the log-odds itself."""

    def make_head(self, hidden_size: int) -> None:
        """Add the head."""
        self.v_head = nn.ModuleDict({"summary": nn.Linear(hidden_size, 1)})

    def log_odds(self, rows: Tensor) -> Tensor:
        """See `_Qwen2WithHead.log_odds`."""
        value: Tensor = self.v_head["summary"](rows).float()
        return value[:, 0]
