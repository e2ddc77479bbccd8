"""VRWKV-T with UPerNet on Cityscapes; the ADE20K recipe, no published figure, not run here.

    torchrun --nproc_per_node=4 tools/train.py \
        configs/vrwkv/vrwkv-tiny_upernet_4xb2-160k_cityscapes-512x1024.py --launcher pytorch --amp
"""

_base_ = [
    "../_base_/seg_runtime_iters.py",
    "../_base_/models/upernet_plain.py",
    "../_base_/datasets/cityscapes_512x1024.py",
    "../_base_/schedules/adamw_160k.py",
]
model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(
        model_name="vrwkv_tiny_patch16_224",
        checkpoint="published",
        drop_path_rate=0.1,
        img_size=(512, 1024),
    ),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(_delete_=True, mode="whole"),
)
optim_wrapper = dict(
    optimizer=dict(lr=1.2e-4),
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(decay_rate=0.95, norm_decay_mult=0.0, bias_decay_mult=0.0),
)
