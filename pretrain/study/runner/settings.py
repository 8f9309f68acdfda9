"""Study files: recipes that are compared, axes of a grid, and stopping rules that all runs share.

A study file names configuration keys and groups exactly as the command line of `epochal train`
does. Keys of the study itself are strict: an unknown one is an error that suggests the right one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from pretrain.config.groups import CONFIG_ROOT
from pretrain.config.messages import describe_all
from pretrain.config.suggest import closest
from pretrain.config.types import PositiveInt, Section
from pretrain.config.yaml_file import read_mapping
from pretrain.errors import ConfigError
from pretrain.study.runner.branches import Branches

PACKAGED = CONFIG_ROOT / "study"
FILE = "study.yaml"
"""Copy of a study file in the folder of its runs."""
RESERVED = ("run.name", "run.root", "run.dir", "train.patience", "train.min_delta")
"""Keys that a study sets itself."""

Axis = tuple[Any, ...]


def _list(given: Any) -> Any:
    """Raise ValueError unless this is a list with at least one entry, each once."""
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"given {given!r}, allowed: a list of values, e.g. [1, 2]")
    texts = [str(value) for value in given]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands twice; list each value once")
    return given


Values = Annotated[Axis, BeforeValidator(_list)]
Grid = dict[str, Values]
"""Values of each configuration key or group."""


class Arm(Section):
    """One recipe that is compared."""

    set: tuple[str, ...] = ()
    """Overrides of this recipe, as on the command line."""
    grid: Grid = Field(default_factory=dict)
    """Axes of this recipe alone; one that the study has too is replaced."""
    like: str | None = None
    """Another recipe, whose `set` comes first, and whose `branches` count where this has none."""
    branches: Branches | None = None
    """Lengths of this recipe, instead of those of the study."""


class Stopping(Section):
    """Rules that end a run before its schedule does, the same for every run."""

    patience: Annotated[int, Field(ge=0)] = 0
    """Evaluations without improvement after which a run ends; 0 lets it go on."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest decrease of the loss in nats per token that counts as an improvement."""
    max_flops: Annotated[float, Field(gt=0)] | None = None
    """Training FLOPs, by `flops_convention`, at which a run ends."""
    max_tokens: Annotated[float, Field(gt=0)] | None = None
    """Processed tokens at which a run ends."""


class Compare(Section):
    """Recipes that a report compares."""

    reference: str
    challengers: tuple[str, ...] = ()


class LearningRate(Section):
    """Statement of how learning rates were chosen over sizes."""

    rule: Literal["tuned per size", "transferred", "one for all", "not stated"]
    """`not stated` is that of sweeps without a file."""
    note: str = ""


class Study(Section):
    """Content of a study file."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    description: str = ""
    base: tuple[str, ...] = ()
    """Overrides of every run, as on the command line of `epochal train`."""
    arms: dict[str, Arm] = Field(default_factory=dict)
    grid: Grid = Field(default_factory=dict)
    """Axes that all recipes share; the runs are their cross product."""
    flops: Values | None = None
    """Training budgets C in FLOPs, instead of `data.epochs`: a run has C / (6 N U) epochs."""
    flops_convention: Literal["six_nd", "counted"] = "six_nd"
    """Operations of a token: 6 N with embeddings in N, or those counted with attention and head."""
    branches: Branches | None = None
    """Lengths instead of `data.epochs`, trained as one trunk and a decay for each of them."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Runs that are left out: those with all the given values; a list stands for any of them."""
    stopping: Stopping = Stopping()
    learning_rate: LearningRate
    parallel_runs: PositiveInt | None = None
    """Runs at the same time; null takes what the machine holds."""
    compare: Compare | None = None
    note: str = ""

    @field_validator("name")
    @classmethod
    def _makes_a_folder(cls, name: str) -> str:
        if name != Path(name).name or name.startswith("."):
            raise ValueError(f"given {name!r}, allowed: a name that makes a folder")
        return name

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _has_a_rule(cls, given: Any) -> Any:
        return {"rule": given} if isinstance(given, str) else given

    @field_validator("flops")
    @classmethod
    def _are_numbers(cls, given: Axis | None) -> tuple[float, ...] | None:
        if given is None:
            return None
        try:
            budgets = tuple(float(value) for value in given)
        except (TypeError, ValueError):
            raise ValueError(f"given {list(given)}, allowed: numbers such as 1e18") from None
        if not all(0 < budget < float("inf") for budget in budgets):
            raise ValueError(f"given {list(given)}, allowed: numbers above 0")
        return budgets

    @model_validator(mode="after")
    def _recipes_fit_together(self) -> Study:
        for name, arm in self.arms.items():
            self.overrides_of(name)
            both = {o.partition("=")[0] for o in arm.set} & {*self.grid, *arm.grid}
            if both:
                key = min(both)
                raise ValueError(
                    f"arms.{name}: {key} is in `set` and also an axis; keep one of them "
                    f"(a `grid` of the recipe replaces the study's axis)"
                )
        named = [] if self.compare is None else [self.compare.reference, *self.compare.challengers]
        for name in named if self.arms else ():
            if name not in self.arms:
                raise ValueError(f"compare: {unknown_arm(name, self.arms)}")
        if self.flops is not None:
            self._check_lengths("flops")
        if any(self.branches_of(name) is not None for name in (None, *self.arms)):
            if self.flops is not None or self.stopping != Stopping():
                raise ValueError("branches: its lengths are whole; leave out flops and stopping")
            self._check_lengths("branches")
        return self

    def _check_lengths(self, source: str) -> None:
        """Raise ValueError where both `source` and epochs say how long a run is."""
        axes = {"grid": self.grid, **{f"arms.{n}.grid": a.grid for n, a in self.arms.items()}}
        sets = {"base": self.base, **{f"arms.{n}.set": a.set for n, a in self.arms.items()}}
        for place, keys in (axes | sets).items():
            if any(str(key).partition("=")[0] == "data.epochs" for key in keys):
                raise ValueError(
                    f"{place}: data.epochs follows from {source}; leave one of the two out"
                )

    def branches_of(self, name: str | None) -> Branches | None:
        """Lengths of a recipe: its own, those of the one it is like, or those of the study."""
        while name is not None:
            arm = self.arms[name]
            if arm.branches is not None:
                return arm.branches
            name = arm.like
        return self.branches

    def overrides_of(self, name: str, below: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Overrides of a recipe, inherited ones first; ValueError where `like` leads nowhere."""
        if name in below:
            raise ValueError(f"arms.{name}.like: {' -> '.join((*below, name))} is a circle")
        if name not in self.arms:
            raise ValueError(f"arms.{below[-1]}.like: {unknown_arm(name, self.arms)}")
        arm = self.arms[name]
        inherited = () if arm.like is None else self.overrides_of(arm.like, (*below, name))
        return (*inherited, *arm.set)


def unknown_arm(name: str, known: Iterable[str]) -> str:
    """Message for a recipe that a study does not have."""
    by_lower = {arm.lower(): arm for arm in known}
    hint = closest(name, by_lower)
    if hint is None:
        return f"unknown arm {name!r}; known: {', '.join(by_lower.values())}"
    return f"unknown arm {name!r}; did you mean {by_lower[hint]!r}?"


def packaged_studies() -> list[str]:
    """Names of the packaged study files."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def find_study(given: str) -> Path:
    """Path of a study file: a path, a folder of a study, or a packaged name; raises ConfigError."""
    path = Path(given)
    if (path / FILE).is_file():
        return path / FILE
    if path.exists() and not path.is_dir():
        return path
    names = packaged_studies()
    if given in names:
        return PACKAGED / f"{given}.yaml"
    hint = closest(given, names)
    raise ConfigError(
        f"no study at {given}; "
        + (f"did you mean {hint}? " if hint else "")
        + "give a YAML file, the folder of a study that was begun, or a packaged name: "
        + ", ".join(names)
    )


def read_study(path: Path, overrides: Iterable[str] = ()) -> Study:
    """Read a study file; `overrides` come after those of `base`. Raises ConfigError."""
    values = read_mapping(path, f"see {PACKAGED / 'smoke.yaml'}")
    return make_study(values, str(path), overrides)


def make_study(values: dict[str, Any], place: str, overrides: Iterable[str] = ()) -> Study:
    """Validate a study; every line of the ConfigError begins with `place`."""
    if overrides:
        values = {**values, "base": [*(values.get("base") or ()), *overrides]}
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        lines = describe_all(
            error, known_settings(), "docs/studies.md and pretrain/study/runner/settings.py"
        )
        raise ConfigError("\n".join(f"{place}: {line}" for line in lines)) from None


def known_settings() -> list[str]:
    """List every dotted key of a study file."""
    sections: dict[str, type[Section]] = {"stopping": Stopping, "compare": Compare}
    sections |= {"learning_rate": LearningRate, "branches": Branches}
    return [
        *Study.model_fields,
        *(f"{name}.{key}" for name, kind in sections.items() for key in kind.model_fields),
        *(f"arms.{key}" for key in Arm.model_fields),
    ]
