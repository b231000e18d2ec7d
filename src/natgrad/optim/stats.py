"""What an optimiser reports about its last step."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


class Stats(Mapping[str, Any]):
    """A mapping of name → number that reads a tensor from the device only when its entry is looked up."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        return value.item() if isinstance(value, Tensor) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __repr__(self) -> str:
        return f"Stats({dict(self)})"

    def unread(self, name: str) -> Any:
        """The entry as it is, a tensor where it is one: nothing waits for the device."""
        return self._values[name]
