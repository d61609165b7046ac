"""MLflow: uploads run folders, and imports runs logged by other programs."""
