"""The program inside the training pod: reads one RunConfig, trains, verifies, reports."""
