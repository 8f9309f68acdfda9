"""Fenced blocks of the documents: what each is, and how a test runs it.

The language of a block says what it is: `bash` (commands), `python` (a program), `yaml`, `json`,
`toml` (files), `text` (output and formulas, which nobody runs). Marks stand before it:

    <!-- file: NAME -->             the block is a file; commands of the same document may read it
    <!-- config -->                 the block is a part of a run's configuration
    <!-- quoted: FILE -->           the block is a piece of a file, which has its own tests
    <!-- needs REASON -->           its commands cannot run in a test, only `--dry-run` where the
                                    reason is not the network
    <!-- needs REASON: WORDS -->    the same for its commands that begin with WORDS
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
]
LANGUAGES = ("bash", "python", "yaml", "json", "toml", "text")
PROGRAMS = ("epochal", "make", "pip", "deepspeed", "torchrun", "sbatch", "mlflow", "python", "bash")
_BLOCK = re.compile(r"((?:^<!-- .* -->\n)*)^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
_MARK = re.compile(r"<!-- (\w+):? ?(.*?) -->")

SMALL_MODEL = {
    "model.num_layers": "2",
    "model.hidden_size": "32",
    "model.num_attention_heads": "4",
}
EXPORTED_MODEL = SMALL_MODEL | {"model.num_layers": "1"}
"""Shape of the model that `export` wrote."""
SMALL = {
    "data.seq_length": "32",
    "data.unique_tokens": "6400",
    "data.epochs": "1",
    "train.global_batch_size": "16",
    "train.micro_batch_size": "null",
    "evaluation.sequences": "16",
    "run.device": "cpu",
}
"""Settings with which a command of the documents trains in a test."""
PLACEHOLDERS = {
    "RUN": "runs/masked",
    "FOLDER": "copy",
    "OUT.safetensors": "masked.safetensors",
    "run.init_from=OUT.safetensors": "run.init_from=masked.safetensors",
}
SHORTER = {
    "vocab_size: 16000": "vocab_size: 400",
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: str
    line: int
    language: str
    marks: tuple[tuple[str, str], ...]
    text: str

    def mark(self, name: str) -> str | None:
        """Value of a mark, or None."""
        return dict(self.marks).get(name)

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block, and the reason why no test can run it."""

    block: Block
    words: tuple[str, ...]
    needs: str | None

    def __str__(self) -> str:
        return f"{self.block} {' '.join(self.words)}"


def blocks(document: str) -> Iterator[Block]:
    """Blocks of a document in order."""
    text = (ROOT / document).read_text()
    for match in _BLOCK.finditer(text):
        line = text[: match.start(2)].count("\n") + 1
        marks = tuple((m[1], m[2]) for m in _MARK.finditer(match[1]))
        yield Block(document, line, match[2], marks, match[3])


def commands(block: Block) -> Iterator[Command]:
    """Commands of a block of `bash`: comments dropped, continued lines joined."""
    reasons = [value.partition(": ") for name, value in block.marks if name == "needs"]
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            spoken = " ".join(words)
            fit = [why for why, _, begin in reasons if spoken.startswith(begin)]
            yield Command(block, tuple(words), fit[0] if fit else None)


def all_commands() -> list[Command]:
    """Commands of all documents."""
    found = [block for name in DOCUMENTS for block in blocks(name) if block.language == "bash"]
    return [command for block in found for command in commands(block)]


def arguments_of_a_run(words: tuple[str, ...]) -> list[str] | None:
    """Arguments of the run that a command starts, whatever starts its ranks; None for others."""
    match words:
        case ("epochal", "train", *rest):
            return rest
        case ("deepspeed" | "torchrun", *_) if "pretrain.train" in words:
            return list(words[words.index("pretrain.train") + 1 :])
        case ("sbatch", *_):
            script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
            return list(words[script + 1 :])
    return None


def small_run(arguments: list[str], model: dict[str, str]) -> list[str]:
    """The arguments with `SMALL` values and those of `model`; `...` stands for any."""
    given = [PLACEHOLDERS.get(word, word) for word in arguments if word != "..."]
    exported = any(word.startswith("run.init_from") for word in given)
    values = SMALL | model | (EXPORTED_MODEL if exported else {})
    kept = [word for word in given if word.partition("=")[0] not in values]
    if "--config" in kept:  # its values are those of a small run
        return given
    return [*kept, *(f"{key}={value}" for key, value in values.items())]


def dry_run(command: Command) -> list[str] | None:
    """Arguments of `epochal` that check a command without doing its work; None where none do."""
    words, arguments = command.words, arguments_of_a_run(command.words)
    if arguments is not None and command.needs != "the network":
        small = small_run(arguments, {"run.root": "fresh"})
        if command.needs:  # other machines than this
            small.remove("run.device=cpu")
        return ["train", *small, *["--dry-run"] * ("--dry-run" not in small)]
    # The table of all models takes half a minute: the slow suite makes it.
    if words[:2] == ("epochal", "plan") and not (command.needs or "--models" in words):
        return [PLACEHOLDERS.get(word, word) for word in words[1:]]
    return None


def real(words: tuple[str, ...]) -> list[str]:
    """The command as a test runs it: shorter where it may be."""
    if words[:2] == ("epochal", "train"):
        return ["epochal", "train", *small_run(list(words[2:]), SMALL_MODEL)]
    given = shorter(" ".join(shlex.quote(PLACEHOLDERS.get(word, word)) for word in words))
    return shlex.split(given)


def outputs(words: list[str]) -> list[str]:
    """Folders that a command makes, and finds there from an earlier one."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    match words:
        case ["epochal", "train", *rest] if not {"--config", "--dry-run"} & {*rest}:
            objective = given.get("objective", "autoregressive")
            return [f"runs/{given.get('run.name', objective)}"]
        case ["epochal", "data", "prepare", *rest]:
            return [rest[rest.index("--out") + 1] if "--out" in rest else "data/builtin"]
        case ["epochal", "reshard", _, "--to", folder, *_]:
            return [folder]
    return []


def shorter(text: str) -> str:
    """Text of a command or file with sizes that a test can afford."""
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


def summary() -> str:
    """Numbers of blocks and commands by what happens to them in the tests."""
    every = [block for name in DOCUMENTS for block in blocks(name)]
    files = sum(block.language not in ("bash", "text") for block in every)
    found = all_commands()
    unfit = Counter(command.needs for command in found if command.needs)
    listed = ", ".join(f"{number} need {reason}" for reason, number in sorted(unfit.items()))
    return f"documents: {files} programs and files, {len(found)} commands, of which {listed}"
