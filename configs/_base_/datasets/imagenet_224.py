"""ImageNet-1k at 224 px with RandAugment, read from folders (train/CLASS/*.JPEG) or tar files."""

data_root = "data/imagenet"
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="LabelledImages",
        data_root=data_root,
        split="train",
        num_classes=1000,
        transform=dict(
            input_size=224, interpolation="bicubic", auto_augment="rand-m9-n2-mstd0.5-inc1"
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="LabelledImages",
        data_root=data_root,
        split="val",
        num_classes=1000,
        test_mode=True,
        transform=dict(input_size=224, interpolation="bicubic", crop_pct=0.875),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TopKAccuracy", topk=(1, 5))
test_evaluator = val_evaluator
