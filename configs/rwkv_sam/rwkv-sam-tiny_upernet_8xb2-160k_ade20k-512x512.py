"""RWKV-SAM's tiny encoder with UPerNet on ADE20K, on its maps of strides 4, 8, 16 and 16.

Start from the weights of the ImageNet recipe: nobody published any. No published figure; not run
here.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/rwkv_sam/rwkv-sam-tiny_upernet_8xb2-160k_ade20k-512x512.py \
        --launcher pytorch --amp --cfg-options model.backbone.checkpoint=/path/to/imagenet.pth
"""

_base_ = [
    "../_base_/seg_runtime_iters.py",
    "../_base_/models/upernet_pyramid.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/adamw_160k.py",
]
model = dict(
    backbone=dict(model_name="rwkv_sam_tiny", drop_path_rate=0.1, out_indices=(0, 1, 2, 3)),
    decode_head=dict(in_channels=[32, 64, 192, 192], num_classes=150),
    auxiliary_head=dict(in_channels=192, num_classes=150),
)
optim_wrapper = dict(
    optimizer=dict(lr=1.2e-4),
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(decay_rate=0.95, norm_decay_mult=0.0, bias_decay_mult=0.0),
)
