"""Stage 1, inter-content alignment: masked text and patches train the content encoder."""

from alignrec.stage import Stage

STAGE = Stage(
    name="pretrain",
    kind="encoder",
    config="alignrec.pretrain.config:PretrainConfig",
    run="alignrec.pretrain.training:run",
    inputs=("dataset",),
    optional_inputs=(),
    # 2: pictures are resized by torch; 3: text head from counts, linear summary; 4: a codebook
    # holds the counts of its codes; 5: held-out texts are in no count, fewer factors of counts
    # 6: layer_decay takes bridges of towers to lie below all layers
    version=6,
)
