"""MLflow, JSONL and console; nothing here may ever stop a run."""
