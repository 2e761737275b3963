"""The tiny stage-2 configuration of ``tiny`` with the options of RAEv2."""

TRANSFORMER = [
    "stage_2.params.conditioning=tokens",
    "stage_2.params.depth=[4,1]",
    "stage_2.params.base_model_depth=2",
    "stage_2.params.use_qknorm=true",
    "stage_2.params.use_pos_embed=false",
    "transport.params.prediction=x",
    "sampler.params.end=0",
]
MUON = [
    "training.optimizer.type=muon",
    "training.optimizer.adamw_lr=1e-3",
    "training.optimizer.weight_decay=0.01",
]
POSTHOC = ["training.posthoc_ema.widths=[0.05,0.1]"]
