"""The runtime of detection by epochs; needs mmdet (`pip install -e ".[detection]"`)."""

_base_ = "./default_runtime.py"
default_scope = "mmdet"
default_hooks = dict(
    checkpoint=dict(save_best="coco/segm_mAP"),
    visualization=dict(type="DetVisualizationHook", draw=True, interval=20),
)
custom_hooks = [
    dict(type="ExactResumeHook"),
    dict(type="InterruptHook"),
    dict(type="TrainingCurveHook"),
]
visualizer = dict(
    _delete_=True, type="DetLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")]
)
