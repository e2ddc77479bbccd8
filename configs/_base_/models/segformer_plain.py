"""SegFormer's all-MLP head (arXiv:2105.15203) on four blocks of a plain backbone, light enough
for a CPU.

The maps of one stride, 8 px, become a pyramid of strides 4, 8, 16 and 32 (arXiv:2203.16527). A
config sets the backbone and the classes.
"""

_base_ = ["./seg_preprocessor.py"]

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size_divisor=8),
    backbone=dict(type="ZooBackbone", model_name="???", out_indices=(1, 3, 4, 5)),
    neck=dict(type="Feature2Pyramid", embed_dim=96, rescales=[2, 1, 0.5, 0.25], norm_cfg=norm_cfg),
    decode_head=dict(
        type="SegformerHead",
        in_channels=[96, 96, 96, 96],
        in_index=[0, 1, 2, 3],
        channels=96,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="PixelCrossEntropy"),
    ),
)
