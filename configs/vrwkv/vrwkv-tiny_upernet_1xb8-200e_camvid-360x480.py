"""VRWKV-T with UPerNet on CamVid at full size, for one GPU; from published weights. Not run here.

python tools/train.py configs/vrwkv/vrwkv-tiny_upernet_1xb8-200e_camvid-360x480.py --amp
"""

_base_ = [
    "../_base_/seg_runtime.py",
    "../_base_/models/upernet_plain.py",
    "../_base_/datasets/camvid.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    data_preprocessor=dict(size=(360, 480)),
    backbone=dict(model_name="vrwkv_tiny_patch16_224", checkpoint="published", drop_path_rate=0.1),
    decode_head=dict(num_classes=11, channels=256),
    auxiliary_head=dict(num_classes=11, channels=128),
    test_cfg=dict(_delete_=True, mode="whole"),
)
optim_wrapper = dict(
    optimizer=dict(lr=1.2e-4, weight_decay=0.01),
    paramwise_cfg=dict(decay_rate=0.95),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=5, convert_to_iter_based=True),
    dict(type="PolyLR", power=1.0, begin=5, end=200, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=200, val_interval=10)
