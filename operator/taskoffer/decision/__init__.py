"""The core: pure functions from values and ``now`` to values. Nothing here does IO, logs or reads a clock."""
