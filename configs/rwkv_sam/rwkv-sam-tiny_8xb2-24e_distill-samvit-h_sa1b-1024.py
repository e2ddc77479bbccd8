"""RWKV-SAM's tiny encoder and neck learn the image embeddings of Segment Anything's ViT-H.

The first stage of RWKV-SAM's training, on 1 % of SA-1B; start from the weights of the ImageNet
recipe. `padding=True` compares the padded part as well, as upstream does. No published figure; not
run here. The embeddings come first, for `train` and in the same way for `val`:

    python tools/cache_embeddings.py samvit_huge_patch16 data/sa1b/train \
        --weights sam_vit_h_4b8939.pth --out-dir data/sa1b_embeddings/train
    torchrun --nproc_per_node=8 tools/train.py \
        configs/rwkv_sam/rwkv-sam-tiny_8xb2-24e_distill-samvit-h_sa1b-1024.py \
        --launcher pytorch --amp
"""

_base_ = [
    "../_base_/distill_runtime.py",
    "../_base_/datasets/sa1b_embeddings_1024.py",
    "../_base_/schedules/adamw_24e_distill.py",
]
model = dict(type="EmbeddingDistiller", student=dict(sam="rwkv_sam_tiny"))
