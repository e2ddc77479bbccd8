"""RWKV-SAM's small model on the joint data of stage 2; see the tiny one. Not run here.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/rwkv_sam/rwkv-sam-small_8xb4-12e_joint-1024.py --launcher pytorch --amp \
        --cfg-options data_root=/path/to/data model.checkpoint=/path/to/stage1.pth
"""

_base_ = "./rwkv-sam-tiny_8xb4-12e_joint-1024.py"
model = dict(model_name="rwkv_sam_small")
