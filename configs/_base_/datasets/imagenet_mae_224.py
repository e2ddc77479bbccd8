"""ImageNet-1k at 224 px without its labels, random crops and flips alone (arXiv:2111.06377)."""

data_root = "data/imagenet"
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="UnlabelledImages",
        data_root=data_root,
        data_prefix=dict(images="train"),
        transform=dict(
            input_size=224, scale=(0.2, 1.0), interpolation="bicubic", color_jitter=None
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="UnlabelledImages",
        data_root=data_root,
        data_prefix=dict(images="val"),
        test_mode=True,
        transform=dict(input_size=224, interpolation="bicubic", crop_pct=0.875),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="ReconstructionError")
test_evaluator = val_evaluator
