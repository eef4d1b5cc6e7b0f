"""The oldest and the newest versions that the package is tested with."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cell:
    name: str
    torch: str
    triton: str
    transformers: str
    numpy: str

    def requirements(self) -> list[str]:
        """Pinned for pip, torch first."""
        return [
            f"{package}=={version}"
            for package, version in asdict(self).items()
            if package != "name"
        ]


# The bounds of pyproject.toml. NumPy: 2.4 breaks the interpreter of Triton 3.2.
OLDEST = Cell("oldest", "2.6.0", "3.2.0", "4.51.0", "2.2.6")
NEWEST = Cell("newest", "2.15.0", "3.9.0", "5.23.0", "2.4.6")
