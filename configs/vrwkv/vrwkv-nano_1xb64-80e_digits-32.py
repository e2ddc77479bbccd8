"""VRWKV-nano on handwritten digits, on a CPU, in minutes; nothing is downloaded.

    python tools/train.py configs/vrwkv/vrwkv-nano_1xb64-80e_digits-32.py

Expected: see README, "What we ran".
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/digits_32.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    type="ImageClassifier",
    model_name="vrwkv_nano_patch8_224",
    num_classes=10,
    img_size=32,
    label_smoothing=0.1,
)
optim_wrapper = dict(optimizer=dict(lr=3e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=2, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        begin=2,
        end=80,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=80, val_interval=10)
