"""K-means over vectors of small integers, exact on any device (patch features -> codebook).

Vectors and centres are integers of at most ``LIMIT`` in size. So every product and sum is exact in
float32, whatever the order of summation: the same codes come out on any number of threads and on a
GPU, and the learned centres are a function of the vectors alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

# Sums of 64 products of 127 x 127 stay below 2**24, up to where float32 counts by ones; single
# values need seven bits, which even bfloat16 and TF32 keep.
LIMIT = 127
MAX_COMPONENTS = 64
SCORES_AT_ONCE = 2**22  # numbers of a block of vectors by codes


@dataclasses.dataclass
class Clusters:
    """Where a run of mini-batch k-means stands (Sculley 2010).

    A centre is the mean of what it was given; what it was given in earlier passes counts half as
    much with every pass.

    Attributes:
        centers: (codes, components) integers.
        sums: (codes, components) of the vectors given to each centre.
        counts: (codes,) vectors given to each centre.
    """

    centers: Float32[Tensor, "codes components"]
    sums: Int64[Tensor, "codes components"]
    counts: Int64[Tensor, " codes"]

    @classmethod
    def at(cls, centers: Float32[Tensor, "codes components"]) -> "Clusters":
        """Start from these centres."""
        return cls(
            centers=centers,
            sums=torch.zeros_like(centers, dtype=torch.int64),
            counts=torch.zeros(len(centers), dtype=torch.int64, device=centers.device),
        )

    def one_pass(
        self,
        batches: Iterable[Float32[Tensor, "batch components"]],
        seen: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Move the centres by each batch in turn; codes that get nothing split the widest ones.

        Args:
            batches: all vectors, in an order that does not change.
            seen: is told the size of each batch when it is done.

        Returns:
            Sum of the squared distances of the vectors to their centres of that moment.
        """
        self.counts //= 2
        self.sums = self.centers.long() * self.counts[:, None]
        given = torch.zeros_like(self.counts)
        spread = torch.zeros_like(self.counts)
        for batch in batches:
            codes, distances = nearest(batch, self.centers)
            given += torch.bincount(codes, minlength=len(given))
            spread.index_add_(0, codes, distances)
            self._take(codes, batch)
            seen(len(batch))
        self._split_widest(given == 0, spread)
        return int(spread.sum())

    def _take(
        self, codes: Int64[Tensor, " batch"], batch: Float32[Tensor, "batch components"]
    ) -> None:
        self.sums.index_add_(0, codes, batch.long())
        self.counts += torch.bincount(codes, minlength=len(self.counts))
        means = (self.sums.double() / self.counts.clamp(min=1)[:, None]).round()
        self.centers = torch.where(self.counts[:, None] > 0, means.float(), self.centers)

    def _split_widest(self, dead: Tensor, spread: Int64[Tensor, " codes"]) -> None:
        """Put each dead centre one step beside one of those with the largest squared distances.

        A crowd of equal vectors has no spread, so no second code is wasted on it.
        """
        empty = dead.nonzero()[:, 0]
        order = torch.sort(spread, descending=True, stable=True).indices
        wide = order[: len(empty)]
        wide = wide[spread[wide] > 0]
        empty = empty[: len(wide)]
        step = torch.ones_like(self.centers[0])
        step[1::2] = -1
        self.centers[empty] = (self.centers[wide] + step).clamp(-LIMIT, LIMIT)
        for parted in (wide, empty):  # what they were given before says nothing about either
            self.counts[parted] = 0


def nearest(
    vectors: Float32[Tensor, "batch components"], centers: Float32[Tensor, "codes components"]
) -> tuple[Int64[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """Return each vector's nearest centre (the first among equals) and its squared distance."""
    if len(vectors) == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=vectors.device)
        return empty, empty
    halves = centers.square().sum(dim=1) / 2  # half-integers are exact as well
    best = [_best(chunk, centers, halves) for chunk in _chunks(vectors, len(centers))]
    score = torch.cat([value for value, _ in best])
    codes = torch.cat([index for _, index in best])
    return codes, (vectors.square().sum(dim=1) - 2 * score).long()


def _best(vectors: Tensor, centers: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.addmm(halves, vectors, centers.T, beta=-1)  # (chunk, codes)
    index = scores.argmax(dim=1)
    return scores.gather(1, index[:, None])[:, 0], index


def _chunks(vectors: Tensor, num_codes: int) -> Iterator[Tensor]:
    rows = max(1, SCORES_AT_ONCE // num_codes)
    for start in range(0, len(vectors), rows):
        yield vectors[start : start + rows]
