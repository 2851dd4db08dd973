"""Embeddings and ranked lists for serving."""

from alignrec.stage import Stage

STAGE = Stage(
    name="export",
    kind="bundle",
    config="alignrec.export.config:ExportConfig",
    run="alignrec.export.bundle:run",
    inputs=("dataset", "embeddings"),
    optional_inputs=("features",),
    version=3,
)
