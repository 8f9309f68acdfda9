"""The train loop, one screen. `deepspeed --module pretrain.train OVERRIDES` enters here.

Each rank runs this file, whether `epochal train` or a launcher started it. The loop names no
backend, no layout and no objective: those are parts of the session.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import EXIT_PREEMPTED
from cluster.rank.orphan import LAUNCHER_PID, end_with_launcher
from cluster.status import write_failure, write_first_failure, write_status
from parallel.runtime import init_distributed
from pretrain.config.compose import compose, save_config
from pretrain.config.preflight import preflight
from pretrain.config.run import Config
from pretrain.errors import TrainingError

if TYPE_CHECKING:
    from pretrain.tracking import Status, Tracking
    from pretrain.training.hooks import Hooks
    from pretrain.training.session import Session

MIXTURE_FACTS = ("unique_tokens", "share", "epochs")
"""Facts recorded of every source of a mix."""


def train(session: Session, hooks: Hooks) -> None:
    """Optimizer steps from the session's state to its end, or until a hook says stop."""
    from pretrain.training.hooks import check_applied

    engine, state = session.engine, session.state
    hooks.before_first_step()
    if hooks.should_stop():
        return
    with session.batches() as batches:
        for batch in batches:
            session.renew_teacher()
            lr = session.learning_rate(batch.stop)
            # The next step's batches are prefetched while the device works on this one's.
            result = engine.step(batch.micro_batches, batch.num_valid, lr, batches.prefetch)
            check_applied(result, state.step)
            state.advance(batch.stop, batch.num_valid, session.flops_per_token)
            hooks.after_step(result, lr)
            if hooks.should_stop():
                break


def run(config: Config) -> int:
    """Train a configuration on this rank and return the exit code."""
    end_with_launcher()
    p = config.parallel
    runtime = init_distributed(p.timeout_minutes, config.run.device, p.tensor_parallel_size)
    # Imported here: with them a wrong configuration would wait seconds for its error message.
    from cluster.rank.preemption import Preemption
    from pretrain.tracking import open_tracking
    from pretrain.training.hooks import Hooks
    from pretrain.training.session import open_session

    preemption = Preemption()
    session = open_session(config, runtime)
    run_dir, is_main = config.run.path, runtime.rank == 0
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
        write_status(run_dir, "running", step=session.state.step, exit_code=1)
    tracking = open_tracking(
        config,
        run_dir,
        rank=runtime.rank,
        total_steps=session.steps_at(session.stop_position),
        resumed=session.resumed_from is not None,
        start_step=session.state.step,
    )
    hooks = Hooks(session, tracking, preemption)
    introduce(session, tracking)
    try:
        train(session, hooks)
    except Exception as error:
        if isinstance(error, TrainingError):
            hooks.save(required=True)
        # Said before trackers flush: launchers end rank 0 soon after another rank has left.
        if is_main:
            write_failure(run_dir, error, step=session.state.step)
        tracking.close("failed")
        raise
    finally:
        preemption.close()
        session.saver.close()
    state: Status = "preempted" if hooks.signal else "finished"
    code = EXIT_PREEMPTED if hooks.signal else 0
    if hooks.signal:
        tracking.message(
            f"{hooks.signal}: saved at step {session.state.step}; the same command goes on from it"
        )
    if is_main:
        write_status(run_dir, state, step=session.state.step, exit_code=code)
    tracking.close(state)
    preemption.wait_for_all()
    return code


def introduce(session: Session, tracking: Tracking) -> None:
    """Tell the person and the tracker what runs."""
    from parallel.checkpoint import read_manifest

    stream = session.train_stream
    tracking.params(
        {
            "parameters": session.num_parameters,
            "unique_tokens": stream.unique_tokens,
            "epochs": stream.epochs,
            "layout": f"{session.topology.layout}, ZeRO {session.config.parallel.zero_stage}",
            "attention": session.attention_kernel,
            "compile": session.compilation,
            "flops_per_token": session.flops_per_token,
        }
    )
    for source in stream.report():
        tracking.params({f"mixture/{source['name']}/{key}": source[key] for key in MIXTURE_FACTS})
    if session.resumed_from is not None:
        tracking.message(f"resumed from {session.resumed_from}")
        before, now = read_manifest(session.resumed_from).precision, session.config.train.precision
        if before != now:
            tracking.message(f"precision was {before} and is {now} from here on")
    elif session.config.run.init_from is not None:
        tracking.message(f"weights from {session.config.run.init_from}")


def main(arguments: list[str] | None = None) -> int:
    """Compose `[--config FILE] [OVERRIDES...]`, train, and print user errors."""
    arguments = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    config: Config | None = None
    try:
        config_file = None
        if arguments[:1] == ["--config"]:
            config_file, arguments = Path(arguments[1]), arguments[2:]
        config = compose(arguments, config_file)
        config = preflight(config, int(os.environ.get("WORLD_SIZE", "0")) or None)
        return run(config)
    except Exception as error:
        code = int(getattr(error, "exit_code", 1))
        rank = int(os.environ.get("RANK", "0"))
        stated = config is not None and _state_failure(config.run.path, rank, error)
        if not hasattr(error, "exit_code"):
            raise
        # `epochal train` prints what was stated, when all ranks have ended.
        if rank == 0 and not (stated and LAUNCHER_PID in os.environ):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return code


def _state_failure(run: Path, rank: int, error: Exception) -> bool:
    """Leave the error of this rank in the run folder; False where there is none."""
    if not run.is_dir():
        return False
    if rank == 0:
        write_failure(run, error)
    else:
        write_first_failure(run, rank, error)
    return True


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without the --local_rank=N of launchers, which also set LOCAL_RANK."""
    return [a for a in arguments if not a.startswith(("--local_rank=", "--local-rank="))]


if __name__ == "__main__":
    sys.exit(main())
