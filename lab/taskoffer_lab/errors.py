"""The one exception of the lab."""


class LabError(Exception):
    """Something that the lab needs is missing or went wrong.

    Args:
        message: What happened, with the names and numbers.
        remedy: What the reader can do about it; printed on a line of its own.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message
