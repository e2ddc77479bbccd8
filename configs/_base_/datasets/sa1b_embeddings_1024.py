"""Images of SA-1B at 1024 px, padded, with embeddings of SAM's ViT-H that were cached.

tools/cache_embeddings.py writes `cache`: 2.1 MB an image.
"""

data_root = "data/sa1b"
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImagesForDistillation",
        data_root=data_root,
        data_prefix=dict(img_path="train"),
        image_size=1024,
        cache="data/sa1b_embeddings/train",
        cached_by=dict(name="samvit_huge_patch16"),
    ),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImagesForDistillation",
        data_root=data_root,
        data_prefix=dict(img_path="val"),
        image_size=1024,
        cache="data/sa1b_embeddings/val",
        cached_by=dict(name="samvit_huge_patch16"),
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="EmbeddingError")
test_evaluator = val_evaluator
