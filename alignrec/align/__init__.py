"""Stage 2: content-category and user-item alignment on the graph."""

import dataclasses

from alignrec.stage import Stage

STAGE = Stage(
    name="align",
    kind="embeddings",
    config="alignrec.align.config:AlignConfig",
    run="alignrec.align.training:run",
    version=3,  # 2: other negatives; 3: which rows were trained is kept
    inputs=("dataset", "features", "graph"),
    optional_inputs=(),
    backend="gloo",  # several ranks are mode sampled, which is on CPUs
)

# The same work with other settings, by default without content features, for comparison.
ABLATION = dataclasses.replace(
    STAGE, name="ablation", config="alignrec.align.config:AblationConfig", inherits="align"
)
