"""RWKV-SAM-nano learns the embeddings of a random EfficientViT-B0 on 70 photographs, on a CPU.

Nothing is downloaded. Random features hardly vary: they are standardised by channel.

    for split in train val; do
        python tools/cache_embeddings.py efficientvit_b0 data/coco_mini/$split --image-size 256 \
            --out-dir data/coco_mini_embeddings/$split
    done
    python tools/train.py configs/rwkv_sam/rwkv-sam-nano_1xb4-30e_distill_coco-mini-256.py
"""

_base_ = [
    "../_base_/distill_runtime.py",
    "../_base_/datasets/sa1b_embeddings_1024.py",
    "../_base_/schedules/adamw_24e_distill.py",
]
data_root = "data/coco_mini"
cache_root = "data/coco_mini_embeddings"
model = dict(
    type="EmbeddingDistiller",
    student=dict(sam="rwkv_sam_nano"),
    standardize=f"{cache_root}/train",
)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        image_size=256,
        cache=f"{cache_root}/train",
        cached_by=dict(name="efficientvit_b0"),
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        image_size=256,
        cache=f"{cache_root}/val",
        cached_by=dict(name="efficientvit_b0"),
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=3e-5, begin=1, end=30, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30, val_interval=10)
default_hooks = dict(logger=dict(interval=10))
