"""RWKV-SAM's small encoder with UPerNet on ADE20K; see the tiny one. Not run here.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/rwkv_sam/rwkv-sam-small_upernet_8xb2-160k_ade20k-512x512.py \
        --launcher pytorch --amp --cfg-options model.backbone.checkpoint=/path/to/imagenet.pth
"""

_base_ = "./rwkv-sam-tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(model_name="rwkv_sam_small", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(decay_rate=0.85))
