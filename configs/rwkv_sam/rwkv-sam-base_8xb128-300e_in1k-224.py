"""RWKV-SAM's base encoder on ImageNet-1k; see the tiny one. No published figure; not run here.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/rwkv_sam/rwkv-sam-base_8xb128-300e_in1k-224.py --launcher pytorch --amp
"""

_base_ = "./rwkv-sam-tiny_8xb128-300e_in1k-224.py"
model = dict(model_name="rwkv_sam_base")
