"""Keys of caches for values that are compared by what they are, and not by what they hold."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Itself(Generic[T]):
    """An immutable value as a key that equals no other value, not even one of the same content.

    To hash a policy by content takes longer than most of what is kept under it. The key holds on to its value, so
    that the identity is not given to another one while the key is in use.
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.value is self.value
