"""taskoffer: admits, runs and watches GPU fine-tuning tasks on Kubernetes."""

__version__ = "0.1.0"
