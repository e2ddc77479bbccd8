"""RWKV-SAM's tiny encoder with UPerNet on CamVid at full size, for one GPU, from random weights.

Not run here.

python tools/train.py configs/rwkv_sam/rwkv-sam-tiny_upernet_1xb8-200e_camvid-360x480.py --amp
"""

_base_ = [
    "../_base_/seg_runtime.py",
    "../_base_/models/upernet_pyramid.py",
    "../_base_/datasets/camvid.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    backbone=dict(model_name="rwkv_sam_tiny", drop_path_rate=0.1, out_indices=(0, 1, 2, 3)),
    decode_head=dict(in_channels=[32, 64, 192, 192], channels=256),
    auxiliary_head=dict(in_channels=192, channels=128),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=5, convert_to_iter_based=True),
    dict(type="PolyLR", power=1.0, begin=5, end=200, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=200, val_interval=10)
