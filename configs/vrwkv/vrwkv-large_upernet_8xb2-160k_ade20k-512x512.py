"""VRWKV-L as a plain backbone with UPerNet on ADE20K; see the tiny one. No published figure.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv/vrwkv-large_upernet_8xb2-160k_ade20k-512x512.py --launcher pytorch --amp
"""

_base_ = "./vrwkv-tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        model_name="vrwkv_large_patch16_192.in22k",
        drop_path_rate=0.4,
        out_indices=(5, 11, 17, 23),
    ),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(decay_rate=0.9))
