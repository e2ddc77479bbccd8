"""A small VRWKV (96 channels, 6 blocks, patches of 8) on CamVid at half size, for a CPU.

    python tools/train.py configs/vrwkv/vrwkv-nano_fcn_1xb2-44e_camvid-180x240.py \
        --cfg-options data_root=/path/to/camvid

Expected: see README, "What we ran"; `configs/vit/` has the same with timm's ViT.
"""

_base_ = [
    "../_base_/seg_runtime.py",
    "../_base_/models/linear_plain.py",
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
            # Fourth root of the inverse share of the pixels, mean about 1 over the pixels.
            class_weight=[0.94, 0.87, 1.91, 0.8, 1.3, 1.07, 1.82, 1.84, 1.22, 2.12, 2.58],
        )
    ),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        begin=1,
        end=44,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=44, val_interval=22)
