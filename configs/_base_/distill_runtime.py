"""The runtime of a distillation: no labels, so no sheet of predictions."""

_base_ = "./default_runtime.py"
custom_hooks = [
    dict(type="ExactResumeHook"),
    dict(type="InterruptHook"),
    dict(type="TrainingCurveHook"),
]
default_hooks = dict(checkpoint=dict(save_best="distill/mse", rule="less"))
