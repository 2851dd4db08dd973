"""Full ranking, metrics, and the HTML report."""

from alignrec.stage import Stage

STAGE = Stage(
    name="evaluation",
    kind="metrics",
    config="alignrec.evaluation.config:EvaluationConfig",
    run="alignrec.evaluation.evaluating:run",
    inputs=("dataset", "embeddings"),
    optional_inputs=("features", "ablation", "encoder"),
    version=3,
)
