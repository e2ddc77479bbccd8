"""A narrow RAN-56 (32 to 256 channels) with an FCN head on CamVid at half size, for a CPU.

    python tools/train.py configs/ran/ran-nano_fcn_1xb4-40e_camvid-180x240.py \
        --cfg-options data_root=/path/to/camvid
"""

_base_ = [
    "../_base_/seg_runtime.py",
    "../_base_/models/upernet_pyramid.py",
    "../_base_/datasets/camvid_half.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    backbone=dict(
        model_name="ran56", stem_width=16, widths=(32, 64, 128, 256), out_indices=(1, 2, 3)
    ),
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=[32, 64, 128],
        in_index=[0, 1, 2],
        input_transform="resize_concat",
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg={{_base_.norm_cfg}},
        align_corners=False,
        loss_decode=dict(
            type="PixelCrossEntropy",
            # Square root of the inverse share of the pixels, mean 1 over the pixels.
            class_weight=[0.88, 0.75, 3.64, 0.64, 1.7, 1.15, 3.33, 3.39, 1.49, 4.5, 6.68],
        ),
    ),
    auxiliary_head=None,
)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=40, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=40, val_interval=10)
