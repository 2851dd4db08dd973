"""User-item edges, item-item nearest neighbours, partitions on disk."""

from alignrec.stage import Stage

STAGE = Stage(
    name="graph",
    kind="graph",
    config="alignrec.graph.config:GraphConfig",
    run="alignrec.graph.building:run",
    # 2: streaming places nodes in blocks that do not depend on the files; 3: of equally near items
    # each query takes others
    version=3,
    inputs=("dataset", "features"),
    optional_inputs=(),
    backend="gloo",  # ranks wait for each other and send nothing; several may search on one GPU
)
