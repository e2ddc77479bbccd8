"""RWKV-SAM's tiny encoder on ImageNet-1k, its pretraining before it learns to segment.

Upstream's schedule and augmentation (no mixup); its head is not published, the label smoothing is
that of Vision-RWKV. No published figure; not run here.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/rwkv_sam/rwkv-sam-tiny_8xb128-300e_in1k-224.py --launcher pytorch --amp
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/adamw_300e_in1k.py",
]
model = dict(
    type="ImageClassifier",
    model_name="rwkv_sam_tiny",
    num_classes=1000,
    label_smoothing=0.1,
    erase=dict(probability=0.25, mode="pixel", max_area=1 / 3),
)
# Nothing of one dimension decays: layer scale, decay, bonus and mixes neither.
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
tta_model = dict(type="FlipTTA")
