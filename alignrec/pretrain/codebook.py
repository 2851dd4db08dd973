"""Visual words: codes of patches, learned on the catalogue's pictures (dataset -> objective).

A patch is described by cosine components of its brightness and of two opponent colours, as in JPEG:
a fixed basis that is close to the principal components of natural pictures (Ahmed et al. 1974), so
nothing has to be decomposed. Of the lowest frequencies the ``MAX_COMPONENTS`` of largest variance
are kept. Raw pixels would spend nearly all codes on brightness and colour, whose variance is
hundreds of times that of an edge; full whitening would spend them on noise, and a patch's own
contrast divided out would lose what tells a black shoe from a white one. So each component is
divided by the square root of its deviation, half way to whitening (Coates & Ng 2012 on why
whitening matters for k-means).

Features are small integers from integer arithmetic (``clustering.py``): a patch has the same code
on any device, any number of threads and any rank.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignrec.pretrain.architecture import CHANNELS
from alignrec.pretrain.clustering import LIMIT, MAX_COMPONENTS, Clusters, nearest
from alignrec.telemetry import Telemetry

CODEBOOK = "codebook.safetensors"
PATCHES_PER_CODE = 32  # a code stands for at least so many patches of the sample, on average
_PASSES = 4
_FREQUENCIES = 8  # along each side of a patch
_ONE = 2**20  # 1.0 of the basis; products with pixels stay exact in float64
_GREY_UNITS = 2**16  # ``_ONE`` / 16: variances are counted in 16ths of a grey level
_DEVIATIONS = 4.0  # of the strongest component that fit into LIMIT
_WHITENING = 0.5
_ROWS_AT_ONCE = 16_384
_STREAM = 6  # stream number of the first centres, apart from those of order, crops and masks

Pixels = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class PatchFeatures:
    """Turns patches into vectors of integers of at most ``LIMIT``.

    Attributes:
        basis: (components, values) integers, in units of 1 / ``_ONE``.
        offset: (components,) integers, the mean patch under the basis.
    """

    basis: Float64[Tensor, "components values"]
    offset: Float64[Tensor, " components"]

    def __call__(
        self, patches: UInt8[Tensor, "batch values"]
    ) -> Float32[Tensor, "batch components"]:
        """Return the features of patches."""
        exact = patches.double() @ self.basis.T - self.offset
        return (exact / _ONE).round().clamp(-LIMIT, LIMIT).float()


@dataclasses.dataclass(frozen=True)
class Codebook:
    """The visual words of a catalogue.

    Attributes:
        features: of patches.
        centers: (codes, components) of the features.
        mean_patches: (codes, values) mean of the patches of each code.
        counts: (codes,) patches of each code in the sample that the codes were learned on.
        facts: how well the codes describe the sample they were learned on.
    """

    features: PatchFeatures
    centers: Float32[Tensor, "codes components"]
    mean_patches: UInt8[Tensor, "codes values"]
    counts: Int64[Tensor, " codes"]
    facts: dict[str, float]

    @property
    def num_codes(self) -> int:
        """Codes that patches can have."""
        return len(self.centers)

    def codes(self, patches: UInt8[Tensor, "batch values"]) -> Int64[Tensor, " batch"]:
        """Return the code of each patch."""
        return nearest(self.features(patches), self.centers)[0]

    def save(self, path: Path) -> None:
        """Write the codebook by rename."""
        tensors = {
            "basis": self.features.basis,
            "offset": self.features.offset,
            "centers": self.centers,
            "mean_patches": self.mean_patches,
            "counts": self.counts,
        }
        spare = path.with_suffix(".writing")
        cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(cpu, spare, metadata={"facts": json.dumps(self.facts)})
        spare.replace(path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Codebook":
        """Read what ``save`` wrote."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()["facts"])
        features = PatchFeatures(tensors["basis"], tensors["offset"])
        return cls(features, tensors["centers"], tensors["mean_patches"], tensors["counts"], facts)


def learn_codebook(
    patches: Pixels,
    *,
    num_codes: int,
    seed: int,
    device: torch.device,
    telemetry: Telemetry,
    state: Path | None = None,
) -> Codebook:
    """Cluster a sample of patches, read piece by piece several times.

    Args:
        patches: (sample, values), best memory-mapped, in random order.
        num_codes: codes at most; fewer for a small sample, and codes without patches are dropped.
        seed: of the first centres.
        device: where to compute; the result does not depend on it.
        telemetry: shows the progress.
        state: file that keeps the centres from pass to pass; a killed run goes on from it.
    """
    features = fit_features(patches, device)
    clusters, done = _start(patches, features, num_codes, seed, state)
    total = (_PASSES + 1) * len(patches)
    with telemetry.progress(total, "patches", done=done * len(patches)) as progress:
        for number in range(done, _PASSES):
            clusters.one_pass(map(features, _pieces(patches, device)), progress.update)
            if state is not None:
                _save_state(clusters, number + 1, state)
        return _judge(patches, features, clusters.centers, progress.update)


def fit_features(patches: Pixels, device: torch.device) -> PatchFeatures:
    """Choose and scale the components by their variance over the sample."""
    basis = cosine_basis(math.isqrt(patches.shape[1] // CHANNELS))
    whole = torch.from_numpy(basis * _ONE).round().to(device)
    first = torch.zeros(len(basis), dtype=torch.int64, device=device)
    second = first.clone()
    for piece in _pieces(patches, device):
        units = (piece.double() @ whole.T / _GREY_UNITS).round().long()
        first += units.sum(dim=0)
        second += units.square().sum(dim=0)
    unit = _GREY_UNITS / _ONE
    mean = first.cpu().numpy() / len(patches)
    variance = np.maximum(second.cpu().numpy() / len(patches) - mean**2, 0.0) * unit**2
    kept = np.argsort(-variance, kind="stable")[:MAX_COMPONENTS]
    kept = kept[variance[kept] > 0] if variance.any() else kept[:1]
    deviation = np.maximum(np.sqrt(variance[kept]), unit)
    scale = deviation**-_WHITENING
    scale *= LIMIT / (_DEVIATIONS * (scale * deviation).max())
    scaled = np.round(basis[kept] * scale[:, None] * _ONE)
    offset = np.round(mean[kept] * unit * scale * _ONE)
    return PatchFeatures(torch.from_numpy(scaled).to(device), torch.from_numpy(offset).to(device))


def cosine_basis(side: int) -> npt.NDArray[np.float64]:
    """Return orthonormal components of low frequency: (components, values).

    Values are in the order (channel, row, column).
    """
    count = min(side, _FREQUENCIES)
    position, frequency = np.arange(side) + 0.5, np.arange(count)[:, None]
    waves = np.cos(np.pi * frequency * position / side) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=np.float64)
    colours /= np.linalg.norm(colours, axis=1, keepdims=True)
    return np.kron(colours, np.kron(waves, waves))


def most_codes(num_codes: int, num_patches: int) -> int:
    """Return how many codes a sample of this size is asked for."""
    return max(1, min(num_codes, num_patches // PATCHES_PER_CODE))


def _start(
    patches: Pixels, features: PatchFeatures, num_codes: int, seed: int, state: Path | None
) -> tuple[Clusters, int]:
    """Return where to go on from, and how many passes are done."""
    device = features.basis.device
    if state is not None and state.exists():
        with safe_open(state, framework="pt", device=str(device)) as file:
            left = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Clusters(left["centers"], left["sums"], left["counts"]), int(left["passes"])
    count = most_codes(num_codes, len(patches))
    rng = np.random.default_rng([seed, _STREAM])
    # catalogues have masses of equal background patches: each counts once
    chosen = np.sort(rng.permutation(len(patches))[: 2 * count])
    vectors = torch.unique(features(torch.from_numpy(patches[chosen]).to(device)), dim=0)
    order = torch.from_numpy(rng.permutation(len(vectors))[:count]).to(device)
    return Clusters.at(vectors[order]), 0


def _save_state(clusters: Clusters, passes: int, state: Path) -> None:
    spare = state.with_suffix(".writing")
    tensors = {name: tensor.cpu() for name, tensor in vars(clusters).items()}
    save_file({**tensors, "passes": torch.tensor(passes)}, spare)
    spare.replace(state)


def _judge(
    patches: Pixels,
    features: PatchFeatures,
    centers: Tensor,
    seen: Any,  # noqa: ANN401
) -> Codebook:
    """Give each patch of the sample its code; codes without patches are dropped."""
    values = patches.shape[1]
    sums = torch.zeros(len(centers), values, dtype=torch.int64, device=centers.device)
    counts = torch.zeros(len(centers), dtype=torch.int64, device=centers.device)
    squares = 0
    for piece in _pieces(patches, centers.device):
        codes, _ = nearest(features(piece), centers)
        sums.index_add_(0, codes, piece.long())
        counts += torch.bincount(codes, minlength=len(counts))
        squares += int(piece.long().square().sum())
        seen(len(piece))
    used = counts > 0
    means = sums[used].double() / counts[used][:, None]
    return Codebook(
        features,
        centers[used].contiguous(),
        means.round().to(torch.uint8),
        counts[used],
        _facts(sums[used].cpu(), counts[used].cpu(), squares),
    )


def _facts(sums: Int64[Tensor, "codes values"], counts: Tensor, squares: int) -> dict[str, float]:
    """Return squared errors of pixels -1 .. 1, as the picture loss of ``pixels`` has them."""
    num_patches, values = int(counts.sum()), sums.shape[1]
    scale = 127.5**2 * num_patches * values
    explained = float((sums.double().square().sum(dim=1) / counts).sum())
    mean = float(sums.sum(dim=0).double().square().sum()) / num_patches
    shares = counts.double() / num_patches
    measured = {
        "quantisation_error": (squares - explained) / scale,
        "mean_patch_error": (squares - mean) / scale,
        "most_frequent_share": float(shares.max()),
        "perplexity": math.exp(-float((shares * shares.log()).sum())),
    }
    # the last digits depend on the order of summation, and the file's digest on all that are there
    rounded = {name: float(f"{value:.6g}") for name, value in measured.items()}
    return {"num_codes": len(counts), "num_patches": num_patches, **rounded}


def _pieces(patches: Pixels, device: torch.device) -> Iterator[UInt8[Tensor, "piece values"]]:
    for start in range(0, len(patches), _ROWS_AT_ONCE):
        yield torch.from_numpy(np.array(patches[start : start + _ROWS_AT_ONCE])).to(device)
