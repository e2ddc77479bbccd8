"""VRWKV-T on ImageNet-1k, the published recipe (no mixup). Published top-1: 75.1 (not run here).

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv/vrwkv-tiny_8xb128-300e_in1k-224.py --launcher pytorch --amp
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/adamw_300e_in1k.py",
]
model = dict(
    type="ImageClassifier",
    model_name="vrwkv_tiny_patch16_224",
    num_classes=1000,
    label_smoothing=0.1,
    erase=dict(probability=0.25, mode="pixel", max_area=1 / 3),
)
tta_model = dict(type="FlipTTA")
