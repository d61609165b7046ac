"""What a run leaves behind: its folder, which is the truth, and the MLflow mirror of it."""
