"""A small VRWKV (96 channels, 6 blocks, patches of 8) learns to paint masked photographs, on a CPU.

    python tools/train.py configs/mae/vrwkv-nano_1xb16-30e_mae_mini-images-128.py \
        --cfg-options data_root=/path/to/data
"""

_base_ = [
    "../_base_/mae_runtime.py",
    "../_base_/datasets/mini_images_128.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    type="MAEPretrainer",
    model_name="vrwkv_nano_patch8_224",
    embed_dim=96,
    depth=6,
    img_size=128,
    decoder=dict(dim=64, depth=2),
)
train_dataloader = dict(batch_size=16)
optim_wrapper = dict(optimizer=dict(lr=2e-3, betas=(0.9, 0.95)))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=2, end=30, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30, val_interval=10)
default_hooks = dict(logger=dict(interval=36))
