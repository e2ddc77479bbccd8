"""RWKV-SAM's base encoder learns the embeddings of SAM's ViT-H; see the tiny one. Not run here.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/rwkv_sam/rwkv-sam-base_8xb2-24e_distill-samvit-h_sa1b-1024.py \
        --launcher pytorch --amp
"""

_base_ = "./rwkv-sam-tiny_8xb2-24e_distill-samvit-h_sa1b-1024.py"
model = dict(student=dict(sam="rwkv_sam_base"))
