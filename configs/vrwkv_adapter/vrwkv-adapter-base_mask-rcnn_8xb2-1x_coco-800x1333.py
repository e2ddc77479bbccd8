"""VRWKV-Adapter-B with Mask R-CNN on COCO, 1x, on 8 GPUs. Not run here.

torchrun --nproc_per_node=8 tools/train.py \
    configs/vrwkv_adapter/vrwkv-adapter-base_mask-rcnn_8xb2-1x_coco-800x1333.py \
    --launcher pytorch --amp

Published: 46.8 and 41.7.
"""

_base_ = [
    "../_base_/det_runtime.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_detection_1333.py",
    "../_base_/schedules/adamw_1x_det.py",
]
model = dict(
    backbone=dict(
        model_name="vrwkv_adapter_base",
        flavour="detection",
        checkpoint="published",
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
