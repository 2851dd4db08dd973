"""Statistics of the samples for the report: one tally per shard, added up at the end."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from data_prep.images import Picture

SIDE_EDGES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
TEXT_EDGES = (0, 1, 25, 50, 100, 200, 400, 800, 1600, 3200)


@dataclasses.dataclass
class Tally:
    """Counts over samples; histograms count values from an edge up to below the next one.

    Attributes:
        images_declared: items whose row names a picture, good or bad.
        images_kept: pictures whose bytes stayed as they came.
        side_counts: longest side in pixels, by SIDE_EDGES.
        text_counts: characters of the text, by TEXT_EDGES.
    """

    samples: int = 0
    images_declared: int = 0
    images: int = 0
    images_kept: int = 0
    images_animated: int = 0
    image_bytes: int = 0
    side_counts: list[int] = dataclasses.field(default_factory=lambda: [0] * len(SIDE_EDGES))
    text_counts: list[int] = dataclasses.field(default_factory=lambda: [0] * len(TEXT_EDGES))

    def add(self, picture: Picture | None, text: str, *, declared: bool) -> None:
        """Count one sample."""
        self.samples += 1
        self.images_declared += declared
        self.text_counts[_bin(len(text), TEXT_EDGES)] += 1
        if picture is not None:
            self.images += 1
            self.images_kept += picture.kept
            self.images_animated += picture.animated
            self.image_bytes += len(picture.data)
            self.side_counts[_bin(max(picture.width, picture.height), SIDE_EDGES)] += 1

    def merge(self, other: Mapping[str, Any]) -> Self:
        """Add another tally, given as plain JSON."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), other[field.name]
            if isinstance(mine, list):
                mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
            else:
                setattr(self, field.name, mine + theirs)
        return self

    def facts(self) -> dict[str, Any]:
        """Return the numbers as the manifest's facts hold them."""
        return {
            "images": {
                "declared": self.images_declared,
                "good": self.images,
                "kept_as_they_came": self.images_kept,
                "animated": self.images_animated,
                "bytes": self.image_bytes,
                "longest_side_pixels": {"edges": list(SIDE_EDGES), "counts": self.side_counts},
            },
            "text": {"characters": {"edges": list(TEXT_EDGES), "counts": self.text_counts}},
        }


def _bin(value: int, edges: tuple[int, ...]) -> int:
    return sum(value >= edge for edge in edges) - 1
