"""A linear classifier of the last map of a plain backbone, the cheapest head: all time goes into
the backbone, which suits a CPU.

A config sets the backbone, its width and the classes.
"""

_base_ = ["./seg_preprocessor.py"]

model = dict(
    data_preprocessor=dict(size_divisor=8),
    backbone=dict(type="ZooBackbone", model_name="???", out_indices=(5,)),
    decode_head=dict(
        type="FCNHead",
        in_channels=96,
        in_index=0,
        channels=96,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=11,
        align_corners=False,
        loss_decode=dict(type="PixelCrossEntropy"),
    ),
)
