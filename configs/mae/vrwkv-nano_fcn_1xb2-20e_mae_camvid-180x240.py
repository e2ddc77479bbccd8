"""The small VRWKV of the CamVid config, started from masked pretraining; 20 epochs instead of 44.

    python tools/train.py configs/mae/vrwkv-nano_1xb16-30e_mae_mini-images-128.py \
        --cfg-options data_root=/path/to/data
    python tools/train.py configs/mae/vrwkv-nano_fcn_1xb2-20e_mae_camvid-180x240.py \
        --cfg-options data_root=/path/to/data/camvid

From random weights: `--cfg-options model.backbone.checkpoint=None`. What we saw: docs/mae.md.
"""

_base_ = "../vrwkv/vrwkv-nano_fcn_1xb2-44e_camvid-180x240.py"
model = dict(
    backbone=dict(checkpoint="work_dirs/vrwkv-nano_1xb16-30e_mae_mini-images-128/epoch_30.pth")
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        begin=1,
        end=20,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=20, val_interval=20)
