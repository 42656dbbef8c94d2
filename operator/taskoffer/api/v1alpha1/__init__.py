"""The resource types of ``taskoffer.dev/v1alpha1``. Their shapes stay: changes are additive."""
