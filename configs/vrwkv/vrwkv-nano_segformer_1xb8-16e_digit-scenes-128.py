"""VRWKV-nano segments scenes of handwritten digits, on a CPU, in minutes; nothing is downloaded.

python tools/train.py configs/vrwkv/vrwkv-nano_segformer_1xb8-16e_digit-scenes-128.py
"""

_base_ = [
    "../_base_/seg_runtime.py",
    "../_base_/models/segformer_plain.py",
    "../_base_/datasets/digit_scenes_128.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    backbone=dict(model_name="vrwkv_nano_patch8_224", img_size=128, out_indices=(0, 1, 2, 3)),
    neck=dict(embed_dim=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        # Five of six pixels are background.
        loss_decode=dict(class_weight=[0.2, *[2.0] * 10]),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=16, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=16, val_interval=4)
