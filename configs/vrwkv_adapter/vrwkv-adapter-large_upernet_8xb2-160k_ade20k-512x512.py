"""VRWKV-L with its adapter and UPerNet on ADE20K; see the tiny one. Published: mIoU 53.5.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv_adapter/vrwkv-adapter-large_upernet_8xb2-160k_ade20k-512x512.py \
        --launcher pytorch --amp
"""

_base_ = "./vrwkv-adapter-tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="vrwkv_adapter_large", drop_path_rate=0.4),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(decay_rate=0.9))
