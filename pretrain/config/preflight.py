"""Checks of a configuration that need neither a process group nor a GPU.

`preflight` compares the configuration with the files that it names: pools, tokenizer, hostfile and
the folder of a run that it would resume. It reads manifests, not shards (the ranks verify those),
and takes less than a second. Every rank may call it; it changes nothing.
"""

from __future__ import annotations

from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.hosts import read_hostfile
from parallel.layout.rules import find_data_parallel_size
from pretrain.config.branch import begin_branch
from pretrain.config.changes import compare, moved_data
from pretrain.config.compose import load_config, replace_values
from pretrain.config.kernels import check_attention
from pretrain.config.run import Config, resolve
from pretrain.config.trackers import file_store, sqlite_uri
from pretrain.errors import ConfigError
from pretrain.training.compilation import missing_compiler
from pretrain.training.learning_rate import check_warmup

if TYPE_CHECKING:
    from data_pipeline.shards.manifest import Manifest
    from data_pipeline.stream.open_stream import NamedPool


def preflight(config: Config, world_size: int | None = None) -> Config:
    """Check the configuration and fill in the values that the first start decides.

    `world_size` is the number of ranks where another program starts them (SLURM); None takes the
    number in the hostfile, else that of the layout. Raises ConfigError, LayoutError or DataError.
    """
    config = with_world_size(config, world_size)
    _check_optimizer(config)
    _check_tracking(config)
    _check_machine(config)
    sequences = _check_data(config)
    run = config.run.path
    if has_checkpoint(run):
        if (run / "config.yaml").exists():
            return _resume_run(config, sequences)
    elif config.run.branch_from is not None:
        return begin_branch(config, config.run.branch_from, sequences)
    elif config.run.init_from is not None:
        _check_init(config, config.run.init_from)
    check_warmup(config.optimizer.schedule, **_length(config, sequences))
    return resolve(config)


def with_world_size(config: Config, world_size: int | None = None) -> Config:
    """Fill in `parallel.data_parallel_size` from the number of ranks; may raise LayoutError."""
    p = config.parallel
    if world_size is None and p.hostfile is not None:
        world_size = sum(read_hostfile(p.hostfile).values())
    found = find_data_parallel_size(
        world_size or config.world_size,
        p.tensor_parallel_size,
        p.pipeline_parallel_size,
        p.context_parallel_size,
        p.data_parallel_size,
    )
    return replace_values(config, {"parallel.data_parallel_size": found})


def has_checkpoint(run: Path) -> bool:
    """True where this run folder has a checkpoint, which a start would resume."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir())


def _check_optimizer(config: Config) -> None:
    """Raise LayoutError where the optimizer refuses the layout, whose other rules were checked."""
    from parallel.engine.optimizer import check_optimizer

    p, precision = config.parallel, config.train.precision
    check_optimizer(config.optimizer.spec(), p.layout, p.zero_stage, precision, p.offload)


def _check_tracking(config: Config) -> None:
    """Raise ConfigError for a store that MLflow has given up."""
    uri = config.tracking.uri
    if config.tracking.mlflow and file_store(uri):
        path = Path((uri or "").removeprefix("file:").removeprefix("//")).absolute()
        raise ConfigError(
            f"tracking.uri is {uri!r}: MLflow has given up its store of plain files, where "
            "measurements are lost; give a sqlite file, e.g. tracking.uri="
            f"{sqlite_uri(path / 'mlflow.db')}, a database or a server (http://...)"
        )


def _check_machine(config: Config) -> None:
    """Raise ConfigError where ranks run here and a GPU, kernel or compiler is missing."""
    from cluster.machine import has_gpu

    if config.parallel.hostfile is not None:
        return
    if config.run.device != "cpu" and not has_gpu():
        if config.run.device == "cuda":
            raise ConfigError(
                "run.device=cuda, but this machine has no NVIDIA driver; set run.device to auto or "
                "cpu, or start on a machine with one"
            )
        try:
            check_attention(config, "this machine has none")
        except ValueError as error:
            raise ConfigError(str(error)) from None
    for name, without in (("compile", "auto or false"), ("compile_loss", "false")):
        missing = missing_compiler() if getattr(config.train, name) is True else None
        if missing is not None:
            raise ConfigError(f"train.{name} true: {missing}, or set train.{name} to {without}")
    if config.model.attention == "flash" and find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention=flash needs the package flash-attn or flash-attn-4 (pip install "
            "'epochal[gpu]'); install it, or set model.attention to auto"
        )


def _check_data(config: Config) -> int:
    """Raise DataError where the files do not fit; the number of sequences of an epoch."""
    from data_pipeline.errors import BudgetError, DataError
    from data_pipeline.shards.manifest import Manifest
    from data_pipeline.stream.budget import Budget
    from data_pipeline.stream.open_stream import NamedPool, read_content, read_pools

    d = config.data
    validation = read_content(d.validation)
    if not isinstance(validation, Manifest):
        raise DataError(f"data.validation {d.validation} is a mix; name the manifest of one pool")
    _check_split("validation", NamedPool(d.validation, validation, None))
    pools = read_pools(d.train, d.unique_tokens, d.order)
    for pool in pools:
        _check_split("train", pool)
        _check_together(pool, validation, f"{pool.location}, {d.validation}")
    _check_tokenizer(d.tokenizer, validation)
    sequences = 0
    for pool in pools:
        try:
            sequences += Budget(pool.unique_tokens, d.seq_length, pool.manifest.tokens).sequences
        except BudgetError as error:
            raise BudgetError(f"{error} ({pool.location})") from None
    return sequences


def _check_init(config: Config, file: Path) -> None:
    """Raise an error where weights do not fit; the ranks compare names and shapes."""
    from parallel.weights_file import read_header

    embeddings = [e for n, e in read_header(file).items() if n.endswith("embedding.weight")]
    width = config.model.hidden_size
    if embeddings and embeddings[0]["shape"][-1] != width:
        raise ConfigError(
            f"run.init_from {file} holds a model of width {embeddings[0]['shape'][-1]}, but "
            f"model.hidden_size is {width}; set model.* to the shape of that model"
        )


def _check_split(split: str, pool: NamedPool) -> None:
    from data_pipeline.errors import ShardError

    if pool.manifest.split != split:
        raise ShardError(
            f"data.{split} names the {pool.manifest.split} split of a pool ({pool.location}); give "
            f"the manifest of its {split} split"
        )
    if pool.manifest.tokens == 0:
        raise ShardError(f"data.{split}: {pool.location} holds no tokens; prepare more text")


def _check_together(pool: NamedPool, validation: Manifest, named: str) -> None:
    from data_pipeline.errors import ShardError

    if pool.manifest.split_rule != validation.split_rule:
        raise ShardError(
            f"data.train and data.validation were split by different rules, so documents may be in "
            f"both; prepare them together ({named})"
        )
    if pool.manifest.tokenizer.pieces_sha256 != validation.tokenizer.pieces_sha256:
        raise ShardError(
            f"data.train and data.validation were written with different tokenizers; prepare them "
            f"together ({named})"
        )


def _check_tokenizer(path: Path, manifest: Manifest) -> None:
    """Raise TokenizerError unless the file has the pieces that the shards were written with."""
    from data_pipeline.errors import TokenizerError
    from data_pipeline.regular import read_regular
    from data_pipeline.tokenizer import load_tokenizer
    from data_pipeline.tokenizer.load import LARGEST

    try:
        if sha256(read_regular(path, LARGEST)).hexdigest() == manifest.tokenizer.sha256:
            return
    except OSError as error:
        raise TokenizerError(
            f"cannot read data.tokenizer {path}: {error.strerror}; give the file that "
            f"`epochal data prepare` wrote next to the manifest"
        ) from None
    tokenizer = load_tokenizer(path)
    if tokenizer.pieces_sha256 != manifest.tokenizer.pieces_sha256:
        raise TokenizerError(
            f"data.tokenizer {path} ({tokenizer.vocab_size:,} ids) is not the one that the shards "
            f"were written with ({manifest.tokenizer.vocab_size:,} ids, pieces "
            f"{manifest.tokenizer.pieces_sha256[:12]}); give that one, or prepare the data again"
        )


def _length(config: Config, sequences: int) -> dict[str, int]:
    """Positions of the run and of a step, by the names of `check_warmup`'s arguments."""
    from data_pipeline.stream.budget import total_positions

    return {
        "total_positions": total_positions(sequences, config.data.epochs),
        "batch_size": config.train.global_batch_size,
    }


def _resume_run(config: Config, sequences: int) -> Config:
    """Take over values of the run in the folder; refuse the folder of another configuration."""
    run, schedule = config.run.path, config.optimizer.schedule
    saved = run / "config.yaml"
    try:
        old = load_config(saved)
    except ConfigError as error:
        raise ConfigError(
            f"{saved} does not fit this version, so that {run} cannot be resumed:\n{error}\n"
            "use the version that wrote it, or choose another run.name"
        ) from None
    if schedule.warmup != old.optimizer.schedule.warmup:  # else it is that of the first start
        check_warmup(schedule, **_length(config, sequences))
    config = replace_values(config, _first_start(old, config))
    differences = compare(old, config) + moved_data(old, config)
    if differences:
        raise ConfigError(
            f"{run} holds checkpoints of another configuration:\n  "
            + "\n  ".join(differences)
            + "\nchoose another run.name, or set these back to resume the run"
        )
    return config


def _first_start(old: Config, new: Config) -> dict[str, Any]:
    """Values that the first start has decided, where the same command leaves them open."""
    values: dict[str, Any] = {}
    if new.objective.time_window is None:
        values["objective.time_window"] = old.objective.time_window
    branch = old.run.branch_from
    if branch is not None and new.run.branch_from in (branch, branch.parent.parent):
        values["run.branch_from"] = str(branch)
        values["run.branch_sha256"] = new.run.branch_sha256 or old.run.branch_sha256
    return values
