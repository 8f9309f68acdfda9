"""Restoring a trained model from its run folder without an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from parallel.checkpoint import assign_weights, latest_checkpoint, load_weights, read_manifest
from parallel.layout.topology import Topology
from parallel.runtime import Runtime, init_distributed
from pretrain.config.compose import load_config, replace_values
from pretrain.config.run import Config, resolve
from pretrain.data import token_space
from pretrain.errors import ConfigError
from pretrain.module import ObjectiveModule
from pretrain.objectives import build_objective

Weights = Literal["ema", "raw"]
"""Averaged weights, or those of the last step."""


@dataclass(frozen=True)
class Restored:
    """A trained module on one process, ready to evaluate or sample."""

    config: Config
    runtime: Runtime
    tokenizer: Tokenizer
    module: ObjectiveModule
    checkpoint: Path
    step: int
    weights: Weights
    """Weights that the module has."""


def restore(run: Path, checkpoint: Path | None = None, weights: Weights | None = None) -> Restored:
    """Restore the newest (or the given) checkpoint of `run`; averaged weights where it has them.

    `weights` demands the averaged or the raw ones. Raises ConfigError where the folder is no run or
    holds no checkpoint, CheckpointError where the weights are missing or do not match their hash.
    """
    from pretrain.build import build_model

    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run} is not a run folder: it has no config.yaml; give a folder that `epochal train` "
            "wrote, e.g. runs/NAME"
        )
    config = resolve(load_config(run / "config.yaml"))
    path = checkpoint or latest_checkpoint(run / "checkpoints")
    if path is None:
        raise ConfigError(
            f"{run} holds no checkpoint yet; train it with epochal train --config "
            f"{run / 'config.yaml'}"
        )
    manifest = read_manifest(path)
    chosen: Weights = weights or ("ema" if manifest.has_ema else "raw")
    loaded = load_weights(path, "ema" if chosen == "ema" else "weight")
    runtime = init_distributed(config.parallel.timeout_minutes, config.run.device)
    topology = Topology.build()
    tokenizer = load_tokenizer(config.data.tokenizer)
    objective = build_objective(config.objective, token_space(tokenizer, config.model))
    # The kernel that trained the weights may not exist on this machine, and weights do not need it.
    portable = replace_values(config, {"model.attention": "auto"})
    module = build_model(portable, topology, objective)
    assign_weights(module, loaded, topology)
    module.to(runtime.device).eval()
    return Restored(config, runtime, tokenizer, module, path, manifest.step, chosen)
