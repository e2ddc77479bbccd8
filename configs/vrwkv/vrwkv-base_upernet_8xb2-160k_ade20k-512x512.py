"""VRWKV-B as a plain backbone with UPerNet on ADE20K.

Upstream published its segmentation models with an adapter around the backbone; this is the recipe
of those (learning rate, layer decay, drop path) without it, and has no published figure.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv/vrwkv-base_upernet_8xb2-160k_ade20k-512x512.py --launcher pytorch --amp
"""

_base_ = [
    "../_base_/seg_runtime_iters.py",
    "../_base_/models/upernet_plain.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/adamw_160k.py",
]
model = dict(
    backbone=dict(
        model_name="vrwkv_base_patch16_224",
        checkpoint="published",
        drop_path_rate=0.3,
        out_indices=(2, 5, 8, 11),
    ),
    neck=dict(embed_dim=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(
    optimizer=dict(lr=6e-5),
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(decay_rate=0.8, norm_decay_mult=0.0, bias_decay_mult=0.0),
)
