"""What containers run besides their main programs: set-up that may be repeated, probes, MLflow's start, the demo."""
