"""`python -m pretrain.cli` is the command `epochal`."""

from pretrain.cli.main import main

main()
