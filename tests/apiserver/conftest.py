"""Fixtures of the apiserver rung."""

from operator_fixtures import bench, caretaker, kubelet, operator, operator_directory, operator_home

__all__ = ["bench", "caretaker", "kubelet", "operator", "operator_directory", "operator_home"]
