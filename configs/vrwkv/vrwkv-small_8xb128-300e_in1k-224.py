"""VRWKV-S on ImageNet-1k, the published recipe. Published top-1: 80.1 (not run here).

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv/vrwkv-small_8xb128-300e_in1k-224.py --launcher pytorch --amp
"""

_base_ = "./vrwkv-tiny_8xb128-300e_in1k-224.py"
model = dict(
    model_name="vrwkv_small_patch16_224",
    drop_path_rate=0.3,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
)
