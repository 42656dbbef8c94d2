"""All that lets taskoffer run where there is no cluster and no GPU.

Cluster providers, simulated GPUs, images, tiny models and data, and the demo. The product never imports it.
"""
