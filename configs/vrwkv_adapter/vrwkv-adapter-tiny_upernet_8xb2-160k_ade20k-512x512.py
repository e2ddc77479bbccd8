"""VRWKV-T with its adapter and UPerNet on ADE20K, the published recipe. Published: mIoU 43.3.

Not run here.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv_adapter/vrwkv-adapter-tiny_upernet_8xb2-160k_ade20k-512x512.py \
        --launcher pytorch --amp
"""

_base_ = [
    "../_base_/seg_runtime_iters.py",
    "../_base_/models/upernet_pyramid.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/adamw_160k.py",
]
model = dict(
    backbone=dict(
        model_name="vrwkv_adapter_tiny",
        checkpoint="published",  # of the plain backbone; the adapter starts anew
        drop_path_rate=0.1,
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192], num_classes=150),
    auxiliary_head=dict(in_channels=192, num_classes=150),
    test_cfg=dict(_delete_=True, mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    optimizer=dict(lr=1.2e-4),
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(
        decay_rate=0.95, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0
    ),
)
