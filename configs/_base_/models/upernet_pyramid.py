"""UPerNet (arXiv:1807.10221) with an FCN auxiliary head on a pyramid of strides 4, 8, 16 and 32.

A config sets the backbone, and the heads' channels and classes.
"""

_base_ = ["./seg_preprocessor.py"]

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size_divisor=32, test_cfg=dict(size_divisor=32)),
    backbone=dict(type="ZooBackbone", model_name="???", out_indices=(1, 2, 3, 4)),
    decode_head=dict(
        type="UPerHead",
        in_channels=[256, 512, 1024, 2048],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="PixelCrossEntropy"),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=1024,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="PixelCrossEntropy", loss_weight=0.4),
    ),
)
