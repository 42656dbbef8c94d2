"""Fixtures of the apiserver rung."""

from operator_fixtures import bench, kubelet, operator, operator_directory, operator_home, running_operator

__all__ = ["bench", "kubelet", "operator", "operator_directory", "operator_home", "running_operator"]
