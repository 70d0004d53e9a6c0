"""MLflow: runs, figures, registered bundles."""
