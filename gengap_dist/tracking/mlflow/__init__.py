"""MLflow: sends what a run folder holds, and reads runs that others have logged."""
