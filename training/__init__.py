"""The offline trainer: makes a model directory, and nothing else."""
