"""The lm-eval task class behind ``math500_*``, ``gsm8k_*``, ``gsm8k_500_*`` and ``arith_*``.

The last word of a task's name says what is computed from the N samples of a problem: ``passk``
pass@k, ``maj`` the majority vote as well, ``bon`` and ``wbon`` Best-of-N and the vote weighted by a
process reward model beside those.

lm-eval fixes the number of samples in the YAML file, keeps only the first of them by default, and
accepts several flags that make the samples copies of each other without a word. This class reads N
from the command line (``--metadata num_samples=16``), hands all N texts to the score, and refuses
or announces what would spoil them. docs/evaluation.md describes every option.

lm-eval must be installed; scoring without it goes through `lm_eval_tasks.scoring`.
"""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_tasks import task_path
from lm_eval_tasks.chat import checkpoint_chat_template
from lm_eval_tasks.data import FieldTypes, read_local_rows
from lm_eval_tasks.errors import stop
from lm_eval_tasks.option_words import LM_EVAL, OptionWords
from lm_eval_tasks.rewards.aggregation import AGGREGATIONS, aggregate
from lm_eval_tasks.scoring import grading_of, metric_names, problem_metrics, score_problem
from lm_eval_tasks.vllm_hook import SampleRequest, install_vllm_hook

logger = logging.getLogger(__name__)

DEFAULT_NUM_SAMPLES = 64
#: Keys of --metadata that the tasks read. lm-eval merges --model_args into the same mapping.
OPTIONS = (
    "num_samples",
    "data_file",
    "chat_template",
    "allow_identical_samples",
    "reward",
    "aggregation",
)
#: What these options are called elsewhere, which their letters do not show. None of these names is
#: an argument of a model class.
SYNONYMS = {
    **dict.fromkeys(("aggregate", "agg"), "aggregation"),
    **dict.fromkeys(("data", "datafile", "file", "dataset"), "data_file"),
    **dict.fromkeys(("n", "samples", "repeats", "num_repeats", "n_samples"), "num_samples"),
    **dict.fromkeys(("template",), "chat_template"),
    **dict.fromkeys(("identical", "allow_identical"), "allow_identical_samples"),
    **dict.fromkeys(("reward_model", "prm"), "reward"),
}
#: Last word of a task's name -> what it reports for each k. The later ones include the earlier
#: ones, which cost nothing more than the samples that are there.
KINDS: dict[str, tuple[str, ...]] = {
    "passk": ("pass",),
    "maj": ("pass", "maj"),
    "bon": ("pass", "maj", "bon"),
    "wbon": ("pass", "maj", "bon", "weighted_bon"),
}
_REWARDED = ("bon", "weighted_bon")


def keep_all(resps: Sequence[list[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Pass all N samples of every problem on; lm-eval's default filter keeps the first only."""
    return list(resps)


class RatedSamples(list[str]):
    """The N samples of a problem on their way to the score, with their rewards."""

    scores: list[float | None] | None = None
    """Aggregated reward of each sample, None for one without; None as a whole: no reward."""


def scored_by_the_class(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Stand in for a YAML file's ``process_results``, without which lm-eval wants other metrics."""
    raise AssertionError("PassAtKTask.process_results is called instead")


class PassAtKTask(ConfigurableTask):
    """A benchmark of which N samples per problem are drawn and scored for every k up to N.

    Subclasses name the benchmark's fields; the YAML files beside them hold prompt, data set and
    sampling defaults, and are the only place for them.
    """

    BENCHMARK: ClassVar[str] = ""
    """Name without the kind: how answers are judged (`lm_eval_tasks.scoring.grading_of`)."""
    PROBLEMS: ClassVar[str] = ""
    """First part of the problems' names, from which the samples' seeds follow; a part of a
    benchmark has that of the whole, so that it draws the same samples."""
    REQUIRED: ClassVar[FieldTypes] = {}
    """Fields that every row must have."""
    OPTIONAL: ClassVar[FieldTypes] = {}
    """Fields that are kept when every row has them."""
    ID_FIELD: ClassVar[str | None] = None
    """Field that identifies a problem; without it, its position in the data set does."""
    QUESTION_FIELD: ClassVar[str] = "question"
    """Field with the bare question, which reward models read."""
    NUM_ROWS: ClassVar[int | None] = None
    """Use only the first rows of the data set; None for all."""
    FOLDER: ClassVar[str] = ""
    """Folder of the YAML files, relative to `task_path()`."""

    @staticmethod
    def check_row(row: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a row beyond its field types, or None."""
        return None

    def __init__(self, config: dict[str, Any] | None = None, words: OptionWords = LM_EVAL) -> None:
        """Build the task from its YAML, completed by the options given at run time.

        Args:
            config: of lm-eval.
            words: what messages call the options.
        """
        self.words = words
        config = self._complete(dict(config or {}))
        metadata = config["metadata"]
        self.methods = KINDS[config["task"].rpartition("_")[2]]
        self.num_samples = _num_samples(metadata)
        _check_options(metadata)
        _check_reward(config["task"], self.BENCHMARK, metadata, self.methods)
        config["process_results"] = scored_by_the_class
        config["repeats"] = self.num_samples
        # One pipeline only: lm-eval scores and logs everything again for each.
        keep = {"function": "custom", "filter_fn": keep_all}
        config["filter_list"] = [{"name": "all", "filter": [keep]}]
        config["metric_list"] = [
            {"metric": name, "aggregation": "mean", "higher_is_better": higher}
            for name, higher in metric_names(self.num_samples, self.methods).items()
        ]
        super().__init__(config=config)

    def _complete(self, config: dict[str, Any]) -> dict[str, Any]:
        """Add the package's definition to an index entry, which only has a name and this class."""
        config.pop("class", None)
        given = config.pop("metadata", None) or {}
        if "doc_to_text" not in config:
            definition = load_yaml(task_path() / self.FOLDER / f"{config['task']}.yaml")
            definition.pop("class")
            config = definition | config
            given = definition["metadata"] | given
        # Never shared with lm-eval's own copy: this class writes into it.
        config["metadata"] = dict(given) | {"num_samples": given.get("num_samples")}
        return config

    # -- data -------------------------------------------------------------------------------------

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the hub data set, or the local JSON lines file named by ``data_file``."""
        path = self.config.metadata.get("data_file")
        if path is None:
            try:
                super().download(dataset_kwargs, **kwargs)
            except (OSError, ValueError) as error:
                reason = str(error).strip().split("\n")[0]
                stop(
                    f"cannot load {self.config.dataset_path} from the hub ({reason}); without a "
                    f"network, give the same rows with {self.words.data_file}FILE.jsonl"
                )
            self._keep_first_rows()
            return
        import datasets

        rows = read_local_rows(str(path), self.REQUIRED, self.OPTIONAL, self.check_row, self.words)
        self.dataset = {self.config.test_split: datasets.Dataset.from_list(rows)}
        self._keep_first_rows()

    def _keep_first_rows(self) -> None:
        if self.NUM_ROWS is None:
            return
        rows = self.dataset[self.config.test_split]
        if len(rows) < self.NUM_ROWS:
            stop(
                f"{self.config.task} is the first {self.NUM_ROWS} rows of the test set and the "
                f"data has {len(rows)}; for other rows take the task of the whole benchmark"
            )
        self.dataset = {self.config.test_split: rows.select(range(self.NUM_ROWS))}

    @staticmethod
    def gold(doc: Mapping[str, Any]) -> str:
        """Return the gold answer of a row."""
        raise NotImplementedError

    # -- requests ---------------------------------------------------------------------------------

    def build_all_requests(
        self,
        *,
        samples: list[int] | None = None,
        cache_requests: bool = False,
        rewrite_requests_cache: bool = False,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the requests, with the checkpoint's chat template unless it is switched off."""
        if cache_requests:
            logger.warning(
                "%s: --cache_requests is ignored, its key knows neither num_samples nor data_file",
                self.config.task,
            )
        if samples is not None and list(samples) != sorted(set(samples)):
            # lm-eval walks the data set in order but labels rows in the order given.
            stop(
                f"--samples for {self.config.task} is {samples}: lm-eval would label the rows "
                "wrongly; give each index once, in ascending order"
            )
        self._check_sampling()
        metadata = self.config.metadata
        metadata["chat_template_applied_by"] = "lm-eval" if apply_chat_template else "nobody"
        if not apply_chat_template and metadata.get("chat_template", "auto") == "auto":
            chat_template = checkpoint_chat_template(metadata, self.words)
            if chat_template is not None:
                apply_chat_template = True
                metadata["chat_template_applied_by"] = "task"
                logger.warning(
                    "%s: the checkpoint has a chat template, so the task applies it "
                    "(%s samples the bare prompt)",
                    self.config.task,
                    self.words.bare_prompt,
                )
        install_vllm_hook()
        super().build_all_requests(
            samples=samples,
            apply_chat_template=apply_chat_template,
            chat_template=chat_template,
            **kwargs,
        )

    def _check_sampling(self) -> None:
        """Refuse settings under which the N samples would be one text N times."""
        settings = self.config.generation_kwargs
        temperature = settings.get("temperature", 1.0)
        is_greedy = settings.get("do_sample") is not True or not float(temperature) > 0
        if is_greedy and self.num_samples > 1:
            stop(
                f"{self.config.task}: do_sample={settings.get('do_sample')}, "
                f"temperature={temperature} draws the same text {self.num_samples} times; keep "
                "do_sample=True and a temperature above 0, or give --metadata num_samples=1"
            )
        for alias in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
            if alias in settings:
                stop(
                    f"{self.config.task}: --gen_kwargs {alias}={settings[alias]} loses against the "
                    f"task's max_gen_toks; give --gen_kwargs max_gen_toks={settings[alias]} instead"
                )
        if settings.get("n", 1) != 1:
            stop(
                f"{self.config.task}: --gen_kwargs n={settings['n']} would be dropped by lm-eval; "
                f"give --metadata num_samples={settings['n']} instead"
            )

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """Build the request of one problem, marked as ours and carrying the problem's name."""
        request = super().construct_requests(doc=doc, ctx=ctx, **kwargs)
        name = doc.get(self.ID_FIELD) if self.ID_FIELD else None
        return SampleRequest(
            request_type=request.request_type,
            doc=request.doc,
            arguments=request.arguments,
            idx=request.idx,
            metadata=request.metadata,
            problem=f"{self.PROBLEMS}/{request.doc_id if name is None else name}",
        )

    # -- responses --------------------------------------------------------------------------------

    def apply_filters(self) -> list[Instance] | None:
        """Check that the samples are samples before anything is graded, then filter."""
        for request in self._instances:
            if len(request.resps) != self.num_samples:
                stop(
                    f"{self.config.task}: {len(request.resps)} samples instead of "
                    f"{self.num_samples} came back for {request.problem}; run without --use_cache"
                )
        if self.num_samples > 1 and all(len(set(r.resps)) == 1 for r in self._instances):
            self._report_identical()
        filtered = super().apply_filters()
        for request in self._instances:
            for name, samples in request.filtered_resps.items():
                if isinstance(samples, str):
                    stop(
                        "a filter reduced the samples of a problem to one text; remove "
                        "filter_list overrides"
                    )
                request.filtered_resps[name] = RatedSamples(samples)
        if self._is_scored() and any(method in self.methods for method in _REWARDED):
            self._rate()
        return filtered  # type: ignore[no-any-return]

    def _rate(self) -> None:
        """Give all samples their rewards, from a model that is loaded for that and freed again."""
        from lm_eval_tasks.rewards.reward import get_reward

        metadata = self.config.metadata
        aggregation = metadata["aggregation"]
        reward = get_reward(metadata["reward"])
        try:
            for request in self._instances:
                question = str(request.doc[self.QUESTION_FIELD])
                for samples in request.filtered_resps.values():
                    found = reward.score_texts([(question, str(text)) for text in samples])
                    # Rounded as in the files of thinkfast-eval reward.
                    steps = [[round(step, 9) for step in one.step_scores] for one in found]
                    samples.scores = [aggregate(scores, aggregation) for scores in steps]
        finally:
            reward.close()

    def _is_scored(self) -> bool:
        """Whether lm-eval wants metrics: ``--predict_only`` takes the function away."""
        return self.config.process_results is scored_by_the_class

    def process_results(
        self, doc: Mapping[str, Any], results: Sequence[RatedSamples]
    ) -> dict[str, float]:
        """Return the metrics of one problem.

        Args:
            doc: the row.
            results: one entry, the N samples.
        """
        if not self._is_scored():
            return super().process_results(doc, results)  # type: ignore[no-any-return]
        (samples,) = results
        grading = grading_of(self.BENCHMARK)
        return problem_metrics(
            score_problem(samples, self.gold(doc), grading, samples.scores), self.methods
        )

    def _report_identical(self) -> None:
        text = str(self._instances[0].resps[0])
        message = (
            f"{self.config.task}: all {self.num_samples} samples of every problem are identical, "
            f"so pass@k would equal pass@1 (first text: {text[:60]!r}). lm-eval's API models send "
            "one fixed seed with every request: give --gen_kwargs seed=-1 for a vLLM server. Other "
            "causes: a temperature near 0, or a model that ends at once. If it is meant: "
            "--metadata allow_identical_samples=true"
        )
        if self.config.metadata.get("allow_identical_samples") is True:
            logger.warning(message)
        else:
            stop(message)


def _num_samples(metadata: dict[str, Any]) -> int:
    """Return N and write it into the metadata, which lm-eval stores beside the results."""
    value = metadata.get("num_samples")
    value = DEFAULT_NUM_SAMPLES if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        stop(f"--metadata num_samples={value!r}: need a whole number of at least 1")
    metadata["num_samples"] = value
    return value


def _check_options(metadata: Mapping[str, Any]) -> None:
    """Refuse wrong option values and near misses of option names."""
    for key in metadata:
        close = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.85)
        meant = SYNONYMS.get(key.lower().replace("-", "_")) or (close[0] if close else None)
        if key not in OPTIONS and meant:
            stop(f"--metadata {key}=...: unknown option, did you mean {meant}?")
    choice = metadata.get("chat_template", "auto")
    if choice not in ("auto", "off"):
        stop(f"--metadata chat_template={choice!r}: accepted are auto (the default) and off")
    allow = metadata.get("allow_identical_samples", False)
    if not isinstance(allow, bool):
        stop(f"--metadata allow_identical_samples={allow!r}: accepted are true and false")


def _check_reward(
    task: str, benchmark: str, metadata: dict[str, Any], methods: Sequence[str]
) -> None:
    """Refuse a missing or wrong reward before anything is sampled; write the default in."""
    if not any(method in methods for method in _REWARDED):
        return  # the options may be meant for other tasks of the same run
    from lm_eval_tasks.rewards.spec import parse_spec

    spec = metadata.get("reward")
    if not isinstance(spec, str):
        stop(
            f"{task} needs a process reward model: --metadata reward=MODEL, or reward=MODEL,"
            "key=value,... in the JSON form of --metadata (docs/evaluation.md); "
            f"{benchmark}_maj needs none"
        )
    parse_spec(spec)
    aggregation = metadata.setdefault("aggregation", "last")
    if aggregation not in AGGREGATIONS:
        accepted = ", ".join(AGGREGATIONS)
        stop(f"--metadata aggregation={aggregation!r}: accepted are {accepted}")
