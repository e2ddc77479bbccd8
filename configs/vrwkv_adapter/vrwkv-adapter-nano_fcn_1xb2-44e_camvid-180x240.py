"""VRWKV-nano with an adapter on CamVid at half size, for a CPU. Not run here.

    python tools/train.py configs/vrwkv_adapter/vrwkv-adapter-nano_fcn_1xb2-44e_camvid-180x240.py \
        --cfg-options data_root=/path/to/camvid

The recipe is that of `configs/vrwkv/vrwkv-nano_fcn_1xb2-44e_camvid-180x240.py`.
"""

_base_ = [
    "../_base_/seg_runtime.py",
    "../_base_/models/upernet_pyramid.py",
    "../_base_/datasets/camvid_half.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    backbone=dict(model_name="vrwkv_adapter_nano", img_size=(192, 256), out_indices=(0, 1, 2, 3)),
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=[64, 64, 64, 64],
        in_index=[0, 1, 2, 3],
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
            # Fourth root of the inverse share of the pixels, mean about 1 over the pixels.
            class_weight=[0.94, 0.87, 1.91, 0.8, 1.3, 1.07, 1.82, 1.84, 1.22, 2.12, 2.58],
        ),
    ),
    auxiliary_head=None,
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=44, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=44, val_interval=22)
