"""VRWKV-B as a masked autoencoder on ImageNet-1k, the published recipe (not run here).

Upstream shifts along the kept patches (single_shift), so a fine-tuning must, too; 121,216,512
parameters, as upstream's.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/mae/vrwkv-base_8xb128-800e_mae_in1k-224.py --launcher pytorch --amp

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv/vrwkv-base_16xb64-300e_in1k-224.py --launcher pytorch --amp \
        --cfg-options model.key_norm=True model.shift=single_shift \
        model.checkpoint=work_dirs/vrwkv-base_8xb128-800e_mae_in1k-224/epoch_800.pth
"""

_base_ = [
    "../_base_/mae_runtime.py",
    "../_base_/datasets/imagenet_mae_224.py",
    "../_base_/schedules/adamw_800e_mae.py",
]
model = dict(
    type="MAEPretrainer",
    model_name="vrwkv_base_patch16_224",
    key_norm=True,
    shift="single_shift",
    drop_path_rate=0.1,
    decoder=dict(
        dim=512, depth=8, post_norm=True, key_norm=True, init_values=1e-5, shift="single_shift"
    ),
)
