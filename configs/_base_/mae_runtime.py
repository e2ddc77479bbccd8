"""The runtime of masked pretraining: no labels; sheets of reconstructions."""

_base_ = "./default_runtime.py"
custom_hooks = [
    dict(type="ExactResumeHook"),
    dict(type="InterruptHook"),
    dict(type="TrainingCurveHook"),
    dict(type="ReconstructionSheetHook"),
]
default_hooks = dict(checkpoint=dict(save_best="mae/mse", rule="less"))
