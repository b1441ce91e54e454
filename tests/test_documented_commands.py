"""Every command of the documentation is run as it is written; see CONTRIBUTING.md for the rules.

A page's commands run in order in a folder of their own, in which MODEL, LLAMBA and TOKENIZER are
tiny generated checkpoints, PROBLEMS.jsonl holds two problems, and distill and thinkfast are the
checkout's, so nothing in a command has to be replaced but the server's port. One server runs at a
time, and pages with the same ``vllm serve`` line share it.
"""

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.reference.random_checkpoints import write_checkpoint
from vllm_thinkfast import compat, envs
from vllm_thinkfast.plugin import ARCHITECTURES

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PAGES = [
    "README.md",
    "docs/getting-started.md",
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").rglob("*.md")
        if path.name != "getting-started.md"
    ),
    "CONTRIBUTING.md",
    "distill/README.md",
]
LANGUAGES = {"console", "sh", "python", "text", "json"}
TIMEOUT_S = 420
PROBLEMS = [
    {"question": "Tom has 3 bags of 4 apples. How many apples?", "answer": "3 * 4 = 12\n#### 12"},
    {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
]
# Blocks of Python that continue a program the reader has.
PYTHON_PRELUDES = {"docs/evaluation.md": "texts, gold = ['so \\\\boxed{4}', '5'], '4'\n"}
# (page, program): the test that runs the page's command with its own data and checks the numbers.
CHECKED_ELSEWHERE = {("docs/evaluation.md", "lm_eval"): "tests/lm_eval_tasks/test_lm_eval_cli.py"}

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!-- not run.*?:.*?-->\s*\Z", re.DOTALL)


def blocks_of(page: str) -> list[tuple[str, str, str]]:
    """(language, contents, text before it) of every fenced block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(m[1], m[2], text[: m.start()]) for m in _FENCE.finditer(text)]


def commands_of(block: str) -> list[str]:
    """The commands of a block; a backslash at the end of a line continues it."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


class Server:
    """The one ``vllm serve`` that is running, if any."""

    def __init__(self, log: Path) -> None:
        self.command = ""
        self.port = 0
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: str, folder: Path, env: dict[str, str]) -> None:
        """Starts a documented command on a free port, unless it is running already."""
        if command == self.command:
            return
        self.stop()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = [*shlex.split(command), "--host", "127.0.0.1", "--port", str(self.port)]
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(words, cwd=folder, env=env, stdout=out, stderr=out)
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    self.command = command
                    return
            except OSError:
                time.sleep(0.5)
        end = self._log.read_text(errors="replace")[-4000:]
        self.stop()
        raise AssertionError(f"{command}: the server did not start\n{end}")

    def stop(self) -> None:
        """Ends the server and waits until it is gone."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process, self.command = None, ""


class Reader:
    """Does what a page says, line by line, in one folder and one environment."""

    def __init__(self, page: str, folder: Path, server: Server, done: set[str]) -> None:
        self.page, self.folder, self.server, self._done = page, folder, server, done
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        self.env["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        # Other tests set these for this process; a reader of the page has not.
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "TRITON_INTERPRET", "PYTHONPATH"):
            self.env.pop(name, None)

    def run(self, command: str) -> None:
        """Runs one line of a ``console`` block."""
        words = shlex.split(command)
        program = words[0]
        if program == "export":
            (assignment,) = words[1:]
            name, _, value = assignment.partition("=")
            expanded = self._bash(f'echo "{value}"', self.folder)
            self.env[name] = expanded.stdout.strip()
        elif program == "make":
            self._dry_run(command)
        elif (self.page, program) in CHECKED_ELSEWHERE:
            other = (ROOT / CHECKED_ELSEWHERE[self.page, program]).read_text(encoding="utf-8")
            assert f'"{Path(self.page).name}"' in other
        elif words[:2] == ["vllm", "serve"]:
            self.server.start(command, self.folder, self.env)
        elif program == "lm_eval" and command in self._done:
            return
        else:
            self._run_to_the_end(command)
        self._done.add(command)

    def run_python(self, code: str) -> None:
        """Runs a ``python`` block as a script."""
        script = self.folder / "snippet.py"
        script.write_text(self._own_port(PYTHON_PRELUDES.get(self.page, "") + code))
        self._succeed(self._bash(f"{shlex.quote(sys.executable)} {script}", self.folder), code)

    def _run_to_the_end(self, command: str) -> None:
        if command.startswith(".venv/bin/"):
            command, folder = command.replace(".venv/bin", str(BIN), 1), ROOT
        else:
            folder = self.folder
        finished = self._bash(self._own_port(command), folder)
        self._succeed(finished, command)
        if command.startswith("curl "):
            check_answer(finished.stdout)

    def _dry_run(self, command: str) -> None:
        """``make -n``: the target exists, and so does every script and module that it would run."""
        assert shlex.split(command)[1:], f"{command}: name the target"
        printed = self._bash(command.replace("make", "make --no-print-directory -n", 1), ROOT)
        self._succeed(printed, command)
        assert printed.stdout.strip(), f"{command}: nothing would be done"
        for line in printed.stdout.splitlines():
            words = shlex.split(line)
            for word in words:
                if word.startswith("scripts/"):
                    assert (ROOT / word).is_file(), line
            if "-m" in words and "python" in line:
                module = words[words.index("-m") + 1]
                package = ROOT / module.replace(".", "/")
                has_it = package.with_suffix(".py").is_file() or package.is_dir()
                assert has_it or importlib.util.find_spec(module), f"{line}: no module {module}"

    def _own_port(self, text: str) -> str:
        return text.replace("localhost:8000", f"127.0.0.1:{self.server.port}")

    def _bash(self, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )

    def _succeed(self, finished: subprocess.CompletedProcess[str], what: str) -> None:
        assert finished.returncode == 0, (
            f"{self.page}: exit code {finished.returncode} of: {what}\n"
            f"{finished.stdout[-1500:]}\n{finished.stderr[-3000:]}"
        )


def check_answer(body: str) -> None:
    """An answer of the server with text in it, whole or streamed."""
    if body.startswith("data: "):
        lines = [line.removeprefix("data: ") for line in body.splitlines() if line]
        assert lines[-1] == "[DONE]"
        deltas = [json.loads(line)["choices"] for line in lines[:-1]]
        text = "".join(c[0]["delta"].get("content") or "" for c in deltas if c)
    else:
        choices = json.loads(body)["choices"]
        text = "".join(choice.get("text") or choice["message"]["content"] for choice in choices)
    assert text


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the names in capitals stand for."""
    folder = tmp_path_factory.mktemp("material")
    write_checkpoint(folder / "MODEL", "m1", seed=1, has_tokenizer=True)
    # bfloat16, as published; without a tokenizer, as published.
    write_checkpoint(folder / "LLAMBA", "llamba", seed=2, dtype=torch.bfloat16)
    (folder / "TOKENIZER").mkdir()
    for file in (folder / "MODEL").iterdir():
        if "token" in file.name:
            (folder / "TOKENIZER" / file.name).write_bytes(file.read_bytes())
    for name in ("distill", "thinkfast"):  # pages name the checkout's recipes and models
        (folder / name).symlink_to(ROOT / name)
    lines = "".join(json.dumps(problem) + "\n" for problem in PROBLEMS)
    (folder / "PROBLEMS.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield one
    one.stop()


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that some page has run."""
    return set()


def reader_of(page: str, material: Path, folder: Path, server: Server, done: set[str]) -> Reader:
    for source in material.iterdir():
        (folder / source.name).symlink_to(source)
    return Reader(page, folder, server, done)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, material: Path, tmp_path: Path, server: Server, done: set[str]) -> None:
    """All ``console`` and ``python`` blocks of a page, in order."""
    reader = reader_of(page, material, tmp_path, server, done)
    for language, block, _ in blocks_of(page):
        if language == "console":
            for command in commands_of(block):
                reader.run(command)
        elif language == "python":
            reader.run_python(block)


@pytest.mark.parametrize(
    "command",
    [
        "thinkfast transform MODEL OUT",
        "thinkfast convert NOWHERE OUT",
        "make no-such-target",
        "curl -s http://localhost:8000/v1/models",
        pytest.param("vllm serve NOWHERE --no-such-flag", marks=pytest.mark.slow),
        "a-program-that-nobody-has",
    ],
)
def test_unrunnable_command_is_found(command: str, material: Path, tmp_path: Path) -> None:
    """The reader notices a command that does not work, wherever it stands."""
    server = Server(tmp_path / "log.txt")
    reader = reader_of("README.md", material, tmp_path, server, set())
    with pytest.raises(AssertionError):
        reader.run(command)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page: str) -> None:
    """Every block has a language, and what is not run says why."""
    for language, block, before in blocks_of(page):
        start = block.splitlines()[0] if block else ""
        assert language in LANGUAGES, f"{page}: block {start!r} is marked {language!r}"
        if language == "sh":
            assert _REASON.search(before), f"{page}: no reason before the sh block {start!r}"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links(page: str) -> None:
    """Links between files lead somewhere, also those to a heading; no placeholders."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            assert not re.search(r"example|your|TODO|<", target), target
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert heading in slugs, f"{page}: {target}"


def test_tree_of_the_readme() -> None:
    """Every entry of the repository's root stands in the tree, and the other way round."""
    (tree,) = (b for _, b, before in blocks_of("README.md") if before.endswith("are\n\n"))
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    found = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        pytest.skip("not a git checkout: no list of the repository's files")
    tracked = {line.split("/")[0] for line in found.stdout.splitlines()}
    assert tracked - named <= {"README.md", ".gitignore"}
    assert all((ROOT / name).exists() for name in named), named


def test_compatibility_table() -> None:
    """The table of vLLM versions repeats compat.py."""
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text, re.MULTILINE))
    oldest, tested = compat.OLDEST_VLLM, compat.TESTED_VLLM
    assert rows[f"older than {oldest}"].startswith("refused")
    assert rows[f"{oldest} and newer"].startswith("accepted")
    assert rows[f"newer than {tested[-1]}"].startswith("accepted with a warning")
    for version in tested:
        assert rows[version].startswith("tested")
    versions = {row for row in rows if re.fullmatch(r"[\d.]+", row)}
    assert versions == set(tested)


def test_files_named_as_evidence_exist() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[^`]*)`", text)
    assert named
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).exists(), name
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_environment_variables() -> None:
    """docs/serving.md lists the variables of envs.py and no other of ours."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    ours = {value for name, value in vars(envs).items() if name.isupper()}
    assert set(re.findall(r"VLLM_THINKFAST_[A-Z_]+", text)) == ours


def test_architectures_are_documented() -> None:
    """Every model type that a published or converted folder carries is in the table of formats."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    from vllm_thinkfast.configs import LlambaConfig, MambaInLlamaConfig

    assert len({target for _, target in ARCHITECTURES}) == 2
    for config_class in (LlambaConfig, MambaInLlamaConfig):
        assert f"`{config_class.model_type}`" in text or f" {config_class.model_type}`" in text
