"""Settings of where a run happens: section ``cluster`` of a recipe (recipe -> engine)."""

import dataclasses

from alignrec.configuration import option


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """What a stage's ranks get, and what happens when one of them dies."""

    max_restarts: int = option(
        2,
        "times that a stage is started again after a rank or its host died",
        minimum=0,
        affects_result=False,
    )
    cpus_per_rank: int | None = option(
        None,
        "CPUs reserved for a rank; null: as many as the hosts have for each",
        minimum=1,
        affects_result=False,
    )
    gpus_per_rank: int | None = option(
        None,
        "GPUs reserved for a rank of a stage that computes on GPUs; null: one where the hosts have "
        "enough, else none",
        minimum=0,
        affects_result=False,
    )
    object_store_bytes: int = option(
        300_000_000,
        "shared memory of the Ray that a run starts for itself, in bytes",
        minimum=80_000_000,
        affects_result=False,
    )
