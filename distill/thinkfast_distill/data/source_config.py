"""The keys of a source in a recipe, by kind; see `data.sources` for what the kinds do."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from thinkfast_distill.data import arith
from thinkfast_distill.data.errors import DataError
from thinkfast_distill.data.formatting import Layout, RecordFormat
from thinkfast_distill.data.step_labels import LastStep
from thinkfast_distill.recipe import RecipeError, parse

LossOn = Literal["all", "completion"]


@dataclass(kw_only=True)
class SourceConfig:
    """What all kinds of sources share."""

    ADDED_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Fields, false or 0 by default, that this kind did not have in earlier versions."""

    kind: str
    """``jsonl``, ``parquet``, ``memmap``, ``hub`` or ``arith``."""

    name: str | None = None
    """Unique label in logs; null: made from the file, folder, data set or split."""

    tokens: int | None = None
    """Budget in tokens without padding; met exactly, the last document is cut there. Shares are
    in proportion to the budgets."""

    weight: float | None = None
    """Share of the tokens relative to the other sources, without a limit. Give ``tokens`` for all
    sources of a mixture or for none; with neither, the weight is 1."""

    epochs: int | None = 1
    """Most passes over the documents; null: any number. A source that ends before its budget stops
    the run with an error; with more passes the same run goes on."""

    loss_on: LossOn | None = None
    """Which tokens are targets; null: as the mixture says. Raw text counts whole either way."""

    def __post_init__(self) -> None:
        for key in ("tokens", "weight", "epochs"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise RecipeError(f"{key}: {value} must be above 0, or null.")
        if self.tokens is not None and self.weight is not None:
            raise RecipeError("weight: give tokens or weight, not both.")

        if self.has_step_labels:
            if self.loss_on == "all":
                raise RecipeError(
                    "loss_on: 'all' is not accepted with step labels, of which only the labels are "
                    "targets; leave it out."
                )
            self.loss_on = "completion"

    @property
    def label(self) -> str:
        """The name used in logs."""
        return self.name or self._default_name()

    @property
    def has_step_labels(self) -> bool:
        """Whether the documents are conversations with step labels, for a process reward model."""
        return False

    def settings(self) -> dict[str, Any]:
        """All fields, for fingerprints and records of what was read.

        Fields that were added later are left out at their default, so that what was written before
        they existed still compares equal.
        """
        added = self.ADDED_FIELDS
        return {key: value for key, value in vars(self).items() if key not in added or value}

    def _default_name(self) -> str:
        return self.kind


@dataclass(kw_only=True)
class RecordSourceConfig(SourceConfig):
    """Sources of records; see `formatting.RecordFormat` for the layouts."""

    layout: Layout = "text"
    """``text``, ``prompt`` (question and answer), ``chat`` (list of turns) or ``steps`` (question
    and labelled steps, for a process reward model)."""

    text_field: str = "text"
    """Field of ``text``."""

    prompt_field: str = "problem"
    """Field of the question in ``prompt``."""

    completion_field: str = "generated_solution"
    """Field of the answer in ``prompt``."""

    messages_field: str = "messages"
    """Field of the turns in ``chat``."""

    question_field: str = "question"
    """Field of the problem in ``steps``."""

    steps_field: str = "steps"
    """Field of the list of steps in ``steps``."""

    labels_field: str = "labels"
    """Field of the list of labels in ``steps``; true or "+": neither it nor a step before it is
    wrong."""

    last_step: LastStep = "any_wrong"
    """``steps``: where conversations about wrong solutions end, see `step_labels`."""

    learn_steps: bool = False
    """``steps``: whether the texts of right steps are targets too, see `step_labels`."""

    system: str | None = None
    """System turn for records without one."""

    @property
    def has_step_labels(self) -> bool:
        """See `SourceConfig`."""
        return self.layout == "steps"

    def format(self) -> RecordFormat:
        """The format of the records."""
        return RecordFormat(**{f.name: getattr(self, f.name) for f in fields(RecordFormat)})


@dataclass(kw_only=True)
class FileSourceConfig(RecordSourceConfig):
    """``jsonl`` and ``parquet``: local files."""

    path: str | list[str]
    """Files or patterns (``*``); relative to the working directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise RecipeError("path: the list is empty; give files.")

    def _default_name(self) -> str:
        return Path(self.path if isinstance(self.path, str) else self.path[0]).stem


@dataclass(kw_only=True)
class MemmapSourceConfig(SourceConfig):
    """``memmap``: a folder written by ``python -m thinkfast_distill.data.tokenise``."""

    ADDED_FIELDS: ClassVar[tuple[str, ...]] = ("step_labels", "learn_steps")

    path: str
    """The folder."""

    step_labels: bool = False
    """Whether its documents are conversations with step labels; the folder must agree."""

    learn_steps: bool = False
    """With step labels, whether the texts of right steps are targets too; the folder must agree."""

    @property
    def has_step_labels(self) -> bool:
        """See `SourceConfig`."""
        return self.step_labels

    def _default_name(self) -> str:
        return Path(self.path).name


@dataclass(kw_only=True)
class HubSourceConfig(RecordSourceConfig):
    """``hub``: a data set of the Hugging Face hub, streamed."""

    ADDED_FIELDS: ClassVar[tuple[str, ...]] = ("skip",)

    dataset: str
    """Repository name, or the name of a loader of the datasets library."""

    config: str | None = None
    """Configuration of the data set."""

    split: str = "train"
    """Split of the data set."""

    revision: str | None = None
    """Commit; give one for a run worth repeating."""

    data_files: str | list[str] | None = None
    """Files of the repository."""

    shuffle_window: int = 10_000
    """Records that are read, and permuted, at once; 1 keeps the data set's order."""

    skip: int = 0
    """Records at the beginning that are left out, for example because they are held out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip < 0:
            raise RecipeError(f"skip: {self.skip} must be >= 0.")

    def _default_name(self) -> str:
        return self.dataset.rpartition("/")[2]


@dataclass(kw_only=True)
class ArithSourceConfig(SourceConfig):
    """``arith``: problems made on the fly, see `thinkfast_distill.data.arith`."""

    ADDED_FIELDS: ClassVar[tuple[str, ...]] = ("mistake", "single_steps")

    split: arith.Split = "train"
    """``train``, ``validation`` or ``test``; no text occurs in two of them."""

    problem_seed: int = 0
    """Another seed, other problems of the same split."""

    num: int = 100_000_000
    """Problems in a pass; the default has no end in practice."""

    min_steps: int = arith.ArithSpec.min_steps
    """Fewest operations of a problem."""

    max_steps: int = arith.ArithSpec.max_steps
    """Most operations of a problem."""

    max_value: int = arith.ArithSpec.max_value
    """Largest value at any step."""

    max_operand: int = arith.ArithSpec.max_operand
    """Largest number added or taken away."""

    mistakes: float | None = None
    """Part of the solutions with a planted mistake, 0 to 1; with it, documents are solutions with
    step labels, for a process reward model. Null: plain solutions."""

    samples: str | None = None
    """JSON lines file with a model's own solutions instead (``question``, ``answer`` as in
    problems' files, ``sample``), which get step labels."""

    last_step: LastStep = "any_wrong"
    """Where conversations about wrong solutions end, see `step_labels`."""

    learn_steps: bool = False
    """Whether the texts of right steps are targets too, see `step_labels`."""

    mistake: arith.Mistake | None = None
    """The one kind of mistake to plant; null: any. See `arith.with_mistake`."""

    single_steps: int | None = None
    """With ``mistakes``: documents are single steps without their problem, and wrong ones have a
    result up to this far from the right one. See `arith.wrong_result`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mistakes is not None and not 0 <= self.mistakes <= 1:
            raise RecipeError(f"mistakes: {self.mistakes} must lie between 0 and 1, or be null.")
        for key in ("mistake", "single_steps"):
            if getattr(self, key) and self.mistakes is None:
                raise RecipeError(f"{key}: give mistakes too, the part that has one.")
        if self.single_steps is not None and self.single_steps < 1:
            raise RecipeError(f"single_steps: {self.single_steps} must be >= 1, or be null.")
        if self.single_steps and self.mistake:
            raise RecipeError("single_steps: leave out mistake.")
        if self.mistakes is not None and self.samples is not None:
            raise RecipeError("samples: give mistakes or samples, not both.")

    @property
    def has_step_labels(self) -> bool:
        """See `SourceConfig`."""
        return self.mistakes is not None or self.samples is not None

    def _default_name(self) -> str:
        if self.samples is not None:
            return Path(self.samples).stem
        ending = "" if self.mistakes is None else "-step-labels"
        if self.single_steps:
            ending += f"-single-{self.single_steps}"
        elif self.mistake:
            ending += f"-{self.mistake}"
        if self.learn_steps:
            ending += "-learnt"
        return f"arith-{self.split}-{self.min_steps}-{self.max_steps}{ending}"


KINDS: dict[str, type[SourceConfig]] = {
    "jsonl": FileSourceConfig,
    "parquet": FileSourceConfig,
    "memmap": MemmapSourceConfig,
    "hub": HubSourceConfig,
    "arith": ArithSourceConfig,
}


def source_config(raw: Mapping[str, Any] | SourceConfig, where: str = "sources") -> SourceConfig:
    """Checks the keys of one source.

    Args:
        raw: the mapping from a recipe, or a config that is returned as it is.
        where: the place, for messages.

    Raises:
        DataError: names the key, the value and what is accepted.
    """
    if isinstance(raw, SourceConfig):
        return raw
    kind = raw.get("kind") if isinstance(raw, Mapping) else None
    if kind not in KINDS:
        raise DataError(f"{where}: kind {kind!r} is not accepted; accepted: {', '.join(KINDS)}")
    try:
        config = parse(KINDS[kind], raw, where)
    except RecipeError as error:
        raise DataError(str(error)) from error
    assert isinstance(config, SourceConfig)
    return config
