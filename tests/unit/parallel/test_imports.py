"""What ranks load before their first step, and what they must not."""

from __future__ import annotations

import subprocess
import sys

UNUSED = ("mlflow", "pandas", "scipy", "matplotlib", "transformers", "fastapi", "hydra", "antlr4",
          "torch._dynamo", "torch._inductor")  # fmt: skip
CODE = """
import sys, torch
real = torch.compile
from parallel.imports import warm_up
warm_up()
import pretrain.train, pretrain.tracking.queue
import pretrain.training.hooks, pretrain.training.session
import parallel.engine.pipeline, parallel.engine.single_stage
import deepspeed.runtime.zero.muon.muon_optimizer  # as DeepSpeed does where it takes an optimizer
from pretrain.config.compose import load_config
print(*(name for name in {unused} if name in sys.modules))
assert torch.compile is real
import mlflow.version
"""


def test_a_rank_loads_nothing_heavy_that_it_may_not_use() -> None:
    """Afterwards both are there for those who want them: MLflow and torch's compiler."""
    code = CODE.format(unused=UNUSED)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
