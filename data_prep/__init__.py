"""Raw catalogue and interaction log in, dataset artifact out, on Ray Data."""

from alignrec.stage import Stage

STAGE = Stage(
    name="data_prep",
    kind="dataset",
    config="data_prep.config:DataPrepConfig",
    run="data_prep.preparation:run",
    inputs=(),
    optional_inputs=(),
    version=3,  # 3: samples have checksums
    driver=True,
)
