"""The train loop, one screen. `deepspeed --module pretrain.train OVERRIDES` enters here.

Each rank runs this file, whether `epochal train` or a launcher started it. The loop names no
backend, no layout and no objective: those are parts of the session.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import EXIT_PREEMPTED
from cluster.folder import exclusive
from cluster.rank.early import StoppedEarly, ended_by_signals
from cluster.rank.orphan import LAUNCHER_PID, end_with_launcher
from cluster.status import read_status, write_failure, write_status
from cluster.terminal import outlive_terminal
from parallel.runtime import init_distributed, read_environment
from pretrain.config.compose import compose, save_config
from pretrain.config.preflight import preflight
from pretrain.config.run import Config
from pretrain.errors import TrainingError
from pretrain.training.compiler_cache import use_default_cache
from pretrain.training.statements import explained, state_early_stop, state_failure

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
    run_dir = config.run.path
    if read_environment().rank != 0:
        return _run(config)
    with exclusive(run_dir):
        earlier = read_status(run_dir)
        # From here on a rank that dies without a word has been running.
        write_status(run_dir, "running", step=earlier["step"] if earlier else 0, exit_code=1)
        return _run(config)


def _run(config: Config) -> int:
    p = config.parallel
    runtime = init_distributed(p.timeout_minutes, config.run.device, p.tensor_parallel_size)
    # Imported here: with them a wrong configuration would wait seconds for its error message.
    from cluster.rank.preemption import Preemption
    from parallel.silence import limit_waiting
    from pretrain.tracking import open_tracking
    from pretrain.training.hooks import Hooks
    from pretrain.training.session import open_session

    preemption = Preemption()
    session = open_session(config, runtime)
    limit_waiting(timedelta(minutes=p.timeout_minutes))
    run_dir, is_main = config.run.path, runtime.rank == 0
    if is_main:
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
    except Exception as met:
        error = explained(met, config)
        if isinstance(error, TrainingError):
            hooks.save(required=True)
        # Said before trackers flush: launchers end rank 0 soon after another rank has left.
        if is_main:
            write_failure(run_dir, error, step=session.state.step)
        tracking.close("failed")
        if error is met:
            raise
        raise error from met
    finally:
        preemption.close()
        session.saver.close()
    state: Status = "preempted" if hooks.signal else "finished"
    code = EXIT_PREEMPTED if hooks.signal else 0
    if hooks.signal:
        tracking.message(
            f"{hooks.signal}: saved at step {session.state.step}; the same command goes on from it"
        )
    message = ""
    if hooks.early.met and not hooks.complete and not hooks.signal:
        message = f"stopped by {hooks.early.reason}"
        tracking.message(message)
    if is_main:
        write_status(run_dir, state, step=session.state.step, message=message, exit_code=code)
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
    if session.origin is not None:
        tracking.params({f"origin/{k}": value for k, value in session.origin.to_dict().items()})
    for source in stream.report():
        tracking.params({f"mixture/{source['name']}/{key}": source[key] for key in MIXTURE_FACTS})
    if session.resumed_from is not None:
        tracking.message(f"resumed from {session.resumed_from}")
        before, now = read_manifest(session.resumed_from).precision, session.config.train.precision
        if before != now:
            tracking.message(f"precision was {before} and is {now} from here on")
    elif session.origin is not None:
        tracking.message(f"branched from {session.origin.path}")
    elif session.config.run.init_from is not None:
        tracking.message(f"weights from {session.config.run.init_from}")


def main(arguments: list[str] | None = None) -> int:
    """Compose `[--config FILE] [OVERRIDES...]`, train, and print user errors."""
    outlive_terminal()
    use_default_cache(os.environ)
    arguments = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    config: Config | None = None
    # A process that started this rank says itself how an early signal ended it.
    by_hand = LAUNCHER_PID not in os.environ
    try:
        with ended_by_signals() if by_hand else nullcontext():
            config_file = None
            if arguments[:1] == ["--config"]:
                config_file, arguments = Path(arguments[1]), arguments[2:]
            config = compose(arguments, config_file)
            config = preflight(config, int(os.environ.get("WORLD_SIZE", "0")) or None)
            return run(config)
    except StoppedEarly as stopped:
        return state_early_stop(config, stopped.name)
    except Exception as met:
        error = met if config is None else explained(met, config)
        code = int(getattr(error, "exit_code", 1))
        rank = int(os.environ.get("RANK", "0"))
        stated = config is not None and state_failure(config.run.path, rank, error)
        if not hasattr(error, "exit_code"):
            raise
        # `epochal train` prints what was stated, when all ranks have ended.
        if rank == 0 and (by_hand or not stated):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return code


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without the --local_rank=N of launchers, which also set LOCAL_RANK."""
    return [a for a in arguments if not a.startswith(("--local_rank=", "--local-rank="))]


if __name__ == "__main__":
    sys.exit(main())
