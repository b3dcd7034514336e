"""What containers run besides their main programs: set-up that may be repeated, health probes, MLflow's start, the demo."""
