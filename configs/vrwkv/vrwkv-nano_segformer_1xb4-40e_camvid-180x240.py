"""A small VRWKV (96 channels, 6 blocks, patches of 8) on CamVid at half size, for a CPU.

    python tools/train.py configs/vrwkv/vrwkv-nano_segformer_1xb4-40e_camvid-180x240.py \
        --cfg-options data_root=/path/to/camvid

Expected: see README, "What we ran"; `configs/vit/` has the same with timm's ViT.
"""

_base_ = [
    "../_base_/seg_runtime.py",
    "../_base_/models/segformer_plain.py",
    "../_base_/datasets/camvid_half.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    backbone=dict(
        model_name="vrwkv_nano_patch8_224",
        embed_dim=96,
        depth=6,
        img_size=(180, 240),
    ),
    decode_head=dict(
        loss_decode=dict(
            # Square root of the inverse share of the pixels, mean 1 over the pixels.
            class_weight=[0.88, 0.75, 3.64, 0.64, 1.7, 1.15, 3.33, 3.39, 1.49, 4.5, 6.68],
        )
    ),
)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        begin=1,
        end=40,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=40, val_interval=10)
