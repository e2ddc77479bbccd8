"""VRWKV-T as a masked autoencoder on ImageNet-1k by the recipe of VRWKV-B (not run here).

The shift is the model's own, over the grid; the decoder's size is our choice.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/mae/vrwkv-tiny_8xb128-800e_mae_in1k-224.py --launcher pytorch --amp

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv/vrwkv-tiny_8xb128-300e_in1k-224.py --launcher pytorch --amp --cfg-options \
        model.checkpoint=work_dirs/vrwkv-tiny_8xb128-800e_mae_in1k-224/epoch_800.pth
"""

_base_ = [
    "../_base_/mae_runtime.py",
    "../_base_/datasets/imagenet_mae_224.py",
    "../_base_/schedules/adamw_800e_mae.py",
]
model = dict(
    type="MAEPretrainer",
    model_name="vrwkv_tiny_patch16_224",
    decoder=dict(dim=256, depth=4),
)
