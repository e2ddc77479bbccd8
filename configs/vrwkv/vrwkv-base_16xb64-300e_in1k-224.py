"""VRWKV-B on ImageNet-1k, the published recipe. Published top-1: 82.0 (not run here).

    srun -n 16 --gpus-per-task 1 python tools/train.py \
        configs/vrwkv/vrwkv-base_16xb64-300e_in1k-224.py --launcher slurm --amp
"""

_base_ = "./vrwkv-small_8xb128-300e_in1k-224.py"
model = dict(model_name="vrwkv_base_patch16_224", drop_path_rate=0.5)
train_dataloader = dict(batch_size=64)
