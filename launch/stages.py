"""The registry: every stage in build order, and which stage makes which input (-> recipe)."""

import alignrec.align
import alignrec.evaluation
import alignrec.export
import alignrec.features
import alignrec.graph
import alignrec.pretrain
import data_prep
from alignrec.stage import Stage

STAGES: tuple[Stage, ...] = (
    data_prep.STAGE,
    alignrec.pretrain.STAGE,
    alignrec.features.STAGE,
    alignrec.graph.STAGE,
    alignrec.align.STAGE,
    alignrec.align.ABLATION,
    alignrec.evaluation.STAGE,
    alignrec.export.STAGE,
)

# Input name -> the stage that makes it.
PROVIDERS = {
    "dataset": "data_prep",
    "encoder": "pretrain",
    "features": "features",
    "graph": "graph",
    "embeddings": "align",
    "ablation": "ablation",
}
