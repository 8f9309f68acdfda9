"""How long a checkpoint keeps the training thread: blocking save against save in the background.

    python benchmarks/checkpoint_pause.py [FOLDER]

One rank, CPU, a model of about 50M parameters with Adam moments and averaged weights (0.8 GB). The
two kinds of save alternate; medians of five. CPU seconds are those of the training thread, so that
other load of the machine does not enter; wall-clock seconds are shown beside them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from parallel.checkpoint import BackgroundSaver, save_checkpoint
from parallel.engine.base import Engine, EngineConfig
from parallel.engine.build import build_engine
from parallel.layout.stages import Stage
from parallel.layout.topology import Topology
from parallel.runtime import init_distributed
from pretrain.config.run import ModelConfig, OptimizerConfig
from pretrain.model.transformer import Transformer
from pretrain.training.parameter_groups import parameter_groups
from pretrain.vocabulary import TokenSpace

REPEATS = 5
MODEL = ModelConfig(num_layers=12, hidden_size=512, num_attention_heads=8, qk_norm=True)
SPACE = TokenSpace(
    vocab_size=32000, padded_vocab_size=32000, pad_id=0, mask_id=1, doc_id=2, never_targets=(0, 1)
)


def build() -> Engine:
    """An engine as after its first step."""
    init_distributed(device="cpu")
    topology = Topology.build()
    stage = Stage(True, True, range(MODEL.num_layers))
    model = Transformer(MODEL, SPACE, topology, stage)
    config = EngineConfig(0, "float32", micro_batch_size=1, num_microbatches=1, ema_decay=0.999)
    engine = build_engine(model, parameter_groups(model, OptimizerConfig()), config, topology)
    engine.optimizer_step = 1
    return engine


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this thread, wall-clock seconds."""
    cpu, wall = time.thread_time(), time.perf_counter()
    action()
    return time.thread_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Print the table."""
    engine, saver = build(), BackgroundSaver()
    parameters = sum(p.numel() for p in engine.parameters.values())
    rows: dict[str, list[tuple[float, float]]] = {"blocking": [], "background": [], "its rest": []}
    base = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        for step in range(REPEATS + 1):
            made = [timed(lambda s=step: save_checkpoint(engine, folder, s, {}, keep=1))]  # type: ignore[misc]
            made.append(timed(lambda s=step: saver.save(engine, folder, s, {}, keep=1)))  # type: ignore[misc]
            made.append(timed(saver.finish))
            if step:  # the first one warms the page cache
                for row, times in zip(rows.values(), made, strict=True):
                    row.append(times)
    print(f"{parameters / 1e6:.1f}M parameters, {16 * parameters / 1e9:.2f} GB a checkpoint")
    print(f"{'training thread':<16}{'CPU s':>8}{'wall s':>8}")
    for kind, times in rows.items():
        cpu, wall = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{kind:<16}{cpu:>8.3f}{wall:>8.3f}")


if __name__ == "__main__":
    main()
