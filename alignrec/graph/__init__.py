"""User-item edges, item-item nearest neighbours, partitions on disk."""

from alignrec.stage import Stage

STAGE = Stage(
    name="graph",
    kind="graph",
    config="alignrec.graph.config:GraphConfig",
    run="alignrec.graph.building:run",
    inputs=("dataset", "features"),
    optional_inputs=(),
)
