"""The trainer: schedule, optimizer, checkpoints, metrics, evaluation and the loop itself."""
