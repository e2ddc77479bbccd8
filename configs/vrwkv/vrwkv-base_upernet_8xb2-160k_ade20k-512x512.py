"""VRWKV-B as a plain backbone with UPerNet on ADE20K; see the tiny one. No published figure.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv/vrwkv-base_upernet_8xb2-160k_ade20k-512x512.py --launcher pytorch --amp
"""

_base_ = "./vrwkv-tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        model_name="vrwkv_base_patch16_224",
        drop_path_rate=0.3,
    ),
    neck=dict(embed_dim=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(decay_rate=0.8))
