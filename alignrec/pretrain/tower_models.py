"""Models of transformers as towers: made from a configuration, read from a folder or the hub.

Only weights in safetensors are read, and no code that comes with a model is ever run.
"""

import contextlib
import functools
import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignrec.errors import UserError
from alignrec.pretrain.architecture import CHANNELS, TextTower, VisionTower

Modality = Literal["vision", "text"]
_INPUTS = {"vision": "pixel_values", "text": "input_ids"}
# ImageNet's, for models without preprocessor_config.json
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# of a head that is not used, or of the host that wrote it
_IDLE = ("id2label", "label2id", "architectures", "_name_or_path", "transformers_version", "dtype")
_NAMES_SHOWN = 4


class FoldedNorm(nn.Module):
    """A batch norm whose statistics are part of its scale and shift.

    Running statistics are no parameters: they would differ from rank to rank and get lost between
    checkpoints. As part of scale and shift they are trained, averaged and kept like all weights.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        shift = -norm.running_mean * scale
        if norm.affine:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
        self.weight = nn.Parameter(scale.detach().clone())
        self.bias = nn.Parameter(shift.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel of (batch, channels, ...)."""
        shape = (-1,) + (1,) * (x.ndim - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)


def make_model(config: dict[str, Any]) -> nn.Module:
    """Return a model with random weights, as towers use it: without pooler, batch norms folded."""
    from transformers import CONFIG_MAPPING, AutoModel

    parsed = _without_kernels(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    return _as_tower(AutoModel.from_config(parsed, trust_remote_code=False))


def _as_tower(model: nn.Module) -> nn.Module:
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        model.pooler = None  # type: ignore[assignment]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats:
                setattr(parent, name, FoldedNorm(child))
    return model


def freeze(model: nn.Module) -> list[str]:
    """Turn parameters into buffers, which no optimizer, ZeRO stage or checkpoint takes apart.

    Returns:
        Their names.
    """
    names = [name for name, _ in model.named_parameters()]
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return names


@functools.cache
def vision_tower(source: str, *, image_size: int, frozen: bool) -> VisionTower:
    """Return the shapes of a vision model, from its configuration alone.

    Args:
        source: folder or hub id.
        image_size: side of the pictures that it will read.
        frozen: whether its weights stay as they are.

    Raises:
        UserError: it is no vision model, or cannot read pictures of this size.
    """
    config, commit = _read_config(source, "vision")
    with torch.device("meta"):
        model = _model_of(config, source, "vision")
        interpolate = (
            "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
            and _plain(config).get("image_size") != image_size
        )
        options = {"interpolate_pos_encoding": True} if interpolate else {}
        pixels = torch.empty(1, CHANNELS, image_size, image_size)
        try:
            states = model(pixel_values=pixels, **options).last_hidden_state
        except Exception as error:  # whatever a model of somebody else raises
            raise UserError(
                f"pretrain.encoder.vision={source} cannot read pictures of {image_size} x "
                f"{image_size} pixels ({_first_line(error)}). Set pretrain.encoder.image_size to "
                f"what it was trained with, or choose another model."
            ) from error
    mean, std = _pixel_statistics(source, commit)
    if states.ndim == 4:
        _, width, rows, columns = states.shape
        places, first = rows, 0
        square = rows == columns
    else:
        _, count, width = states.shape
        first = _first_place(config, count, image_size)
        places = math.isqrt(max(count - first, 0))
        square = places > 0 and first >= 0 and places**2 == count - first
    if not square:
        raise UserError(
            f"pretrain.encoder.vision={source} gives states of shape {tuple(states.shape)}, which "
            f"are no square grid. Choose a model that keeps the picture's places."
        )
    return VisionTower(
        config=_plain(config),
        width=width,
        places_per_side=places,
        first_place=first,
        interpolate=interpolate,
        mean=mean,
        std=std,
        frozen=frozen,
        commit=commit,
    )


def _first_place(config: Any, count: int, image_size: int) -> int:  # noqa: ANN401 - of transformers
    """Return how many states come before those of the picture's places; -1: cannot be told."""
    before = {0, 1, 1 + (getattr(config, "num_register_tokens", None) or 0)}
    if config.model_type == "deit":
        before = {2}  # CLS, distillation
    patch_size = getattr(config, "patch_size", None)
    if isinstance(patch_size, int):
        rest = count - (image_size // patch_size) ** 2
        if rest in before:
            return rest
        # stages that halve the grid leave fewer places, and none of them a CLS
        before = {0} if rest < 0 else set()
    squares = (first for first in before if math.isqrt(max(count - first, 0)) ** 2 == count - first)
    return next(squares, -1)


@functools.cache
def text_tower(source: str, *, vocabulary_size: int, max_tokens: int, frozen: bool) -> TextTower:
    """Return the shapes of a text model, from its configuration alone.

    Args:
        source: folder or hub id.
        vocabulary_size: tokens that it will read.
        max_tokens: length of the longest text.
        frozen: whether its weights stay as they are.

    Raises:
        UserError: it is no text model, or has too few words or positions.
    """
    config, commit = _read_config(source, "text")
    with torch.device("meta"):
        model = _model_of(config, source, "text")
        try:
            states = model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).last_hidden_state
        except Exception as error:  # whatever a model of somebody else raises
            raise UserError(
                f"pretrain.encoder.text={source} does not turn tokens into one state each "
                f"({_first_line(error)}). Choose an encoder, such as BERT or RoBERTa."
            ) from error
    if vocabulary_size > (known := config.vocab_size):
        raise UserError(
            f"pretrain.tokenizer.path has {vocabulary_size} tokens, but {source} has embeddings "
            f"for {known}: some would have none. Leave pretrain.tokenizer.path out: the text "
            f"tower's own is taken then."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        # RoBERTa and its kin count positions from the id of padding on
        unused = getattr(getattr(model, "embeddings", None), "padding_idx", None)
        limit -= 0 if unused is None else unused + 1
        if max_tokens > limit:
            raise UserError(
                f"pretrain.encoder.max_text_tokens={max_tokens} is more than the {limit} positions "
                f"of {source}. Lower it."
            )
    return TextTower(config=_plain(config), width=states.shape[-1], frozen=frozen, commit=commit)


def read_weights(
    source: str, modality: Modality, *, commit: str | None = None
) -> dict[str, Tensor]:
    """Return the fp32 weights of a model under the names of ``make_model``.

    Args:
        source: folder or hub id.
        modality: which tower, or which half of a model of both.
        commit: of the hub; without one, the newest.

    Raises:
        UserError: there are none in safetensors, they are damaged, or some are missing.
    """
    from transformers import AutoModel

    config, _ = _read_config(source, modality, commit)
    try:
        with _quiet():
            model, report = AutoModel.from_pretrained(
                source,
                config=config,
                revision=commit,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # OSError, ValueError, SafetensorError, and the hub's own
        raise UserError(
            f"pretrain.encoder.{modality}={source} has no weights that can be read as safetensors "
            f"({_first_line(error)}). Give a folder with model.safetensors; what was saved by "
            f"pickle is refused, since it could run."
        ) from error
    poolers = _pooler_names(model)
    absent = sorted(set(report["missing_keys"]) - poolers)
    absent += [name for name, *_ in report["mismatched_keys"]]
    if absent:
        raise UserError(
            f"pretrain.encoder.{modality}={source}: {len(absent)} weights of its own config.json "
            f"are missing or of other shapes ({', '.join(absent[:_NAMES_SHOWN])}), so they would "
            f"be random. Give the complete model."
        )
    return {name: t.detach().float() for name, t in _as_tower(model).named_parameters()}


def _pooler_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("pooler.")}


def _read_config(
    source: str, modality: Modality, commit: str | None = None
) -> tuple[Any, str | None]:
    """Return a model's configuration and its commit, which folders have not."""
    from transformers import AutoConfig

    try:
        if not Path(source).is_dir() and (Path(source).is_absolute() or source.startswith(".")):
            raise OSError("no such folder")
        with _quiet():
            commit = commit or _newest_commit(source)
            config = AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and the hub's own
        raise UserError(
            f"pretrain.encoder.{modality}={source} is no folder with a transformers model, and the "
            f"hub has none of that name ({_first_line(error)}). Correct it; on a host without "
            f"network give a folder with config.json and model.safetensors."
        ) from error
    # of a model of both (CLIP, SigLIP) its half
    own = getattr(config, f"{modality}_config", None) or config
    return _without_kernels(own), commit


def _newest_commit(source: str) -> str | None:
    """Return which commit of the hub a name stands for now; None of a folder."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        return None
    snapshot = Path(cached_file(source, "config.json")).parent
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def _without_kernels(config: Any) -> Any:  # noqa: ANN401 - a transformers config
    """Let transformers choose how to compute: a configuration may name code that is on the hub."""
    config._attn_implementation = None  # of the configurations in it too
    config._experts_implementation = None
    return config


def _model_of(config: Any, source: str, modality: Modality) -> nn.Module:  # noqa: ANN401
    try:
        with _quiet():
            model = make_model(_plain(config))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"pretrain.encoder.{modality}={source} is of a kind that this transformers does not "
            f"know ({_first_line(error)}). Choose another model."
        ) from error
    expected = _INPUTS[modality]
    if (given := getattr(model, "main_input_name", expected)) != expected:
        raise UserError(
            f"pretrain.encoder.{modality}={source} is a {type(model).__name__}, which reads "
            f"{given}, not {expected}. Give a {modality} model."
        )
    return model


def _plain(config: Any) -> dict[str, Any]:  # noqa: ANN401 - a transformers config
    """Return a configuration as JSON values, without what only a head or a host needs."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in _IDLE}


def _pixel_statistics(
    source: str, revision: str | None
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and std of preprocessor_config.json, ImageNet's without one."""
    from transformers.utils import cached_file

    name = "preprocessor_config.json"
    try:
        file = cached_file(
            source, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        values = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} of pretrain.encoder.vision={source} cannot be read ({_first_line(error)}), so "
            f"pixels might be normalised wrongly. Correct the file, or remove it from the folder "
            f"(ImageNet's numbers are used then)."
        ) from error
    mean, std = values.get("image_mean", _MEAN), values.get("image_std", _STD)
    try:
        (a, b, c), (d, e, f) = map(float, mean), map(float, std)
        ok = min(d, e, f) > 0
    except (TypeError, ValueError):
        ok = False
    if not ok:
        raise UserError(
            f"{file}: image_mean={mean} and image_std={std} are not three numbers each, std above "
            f"0, so pixels cannot be normalised. Correct the file or remove it (ImageNet's are "
            f"used then)."
        )
    return (a, b, c), (d, e, f)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' notes and progress bars from the user: what matters is an error."""
    from transformers.utils import logging as notes

    level, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    try:
        yield
    finally:
        notes.set_verbosity(level)
        if bars:
            notes.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
