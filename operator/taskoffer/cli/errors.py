"""How a command ends that cannot do what it was asked for."""


class CommandError(Exception):
    """What a command tells its user, and the exit code that goes with it: 1 failed, 2 wrong usage."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
