"""One content feature per item, from the encoder or imported."""

from alignrec.stage import Stage

STAGE = Stage(
    name="features",
    kind="features",
    config="alignrec.features.config:FeaturesConfig",
    run="alignrec.features.extraction:run",
    inputs=("dataset",),
    optional_inputs=("encoder",),
    version=3,  # 2: pooled halves are centred apart; 3: pictures are resized by torch
)
