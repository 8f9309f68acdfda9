"""Columns of the tidy table of a study: one row for each evaluation of each run.

`study collect` makes it, fits and figures read it. Beside these columns a table has one for each
axis of the study, under its dotted key (`optimizer.weight_decay`).
"""

from __future__ import annotations

COLUMNS: dict[str, str] = {
    "study": "name of the study",
    "run": "name of the run in the study, unique",
    "arm": "recipe that is compared, e.g. `masked, tuned`; runs of one arm differ in size, unique "
    "tokens, length and seed only",
    "family": "objective, e.g. `masked`",
    "likelihood": "`exact` or `bound`: kind of `loss`",
    "seed": "run.seed; runs that differ in it alone are one configuration",
    "configuration": "name of the run without its seed: the cluster of a bootstrap",
    "params": "parameters, embeddings included",
    "params_non_embedding": "parameters of the layers alone",
    "unique_tokens": "budget U",
    "tokens": "tokens processed up to this evaluation, D",
    "epochs": "D / U",
    "planned_epochs": "epochs that the schedule of the run spans",
    "final": "true for the evaluation after the whole schedule",
    "step": "optimizer step",
    "flops": "training FLOPs up to this evaluation, counted with attention and head",
    "flops_6nd": "6 N D, with embeddings in N: the convention of the founding papers",
    "loss": "validation loss in nats per token, exact or bound",
    "noise_error": "standard error of the noise draws; 0 where exact, empty where unknown",
    "standard_error": "standard error over the validation sequences and noise",
    "bits_per_byte": "the same likelihood in bits per byte of the scored text",
}
"""Name and meaning of each column, in the order of the file."""
