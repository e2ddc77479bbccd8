"""A sample of CIFAR-10 in class folders: train/CLASS/*.jpg and val/CLASS/*.jpg, 32 px."""

data_root = "data/cifar10_small"
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="LabelledImages",
        data_root=data_root,
        split="train",
        num_classes=10,
        transform=dict(input_size=32, scale=(0.5, 1.0), color_jitter=0.2),
    ),
)
val_dataloader = dict(
    batch_size=200,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="LabelledImages",
        data_root=data_root,
        split="val",
        num_classes=10,
        test_mode=True,
        transform=dict(input_size=32, crop_pct=1.0),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TopKAccuracy", topk=(1, 5))
test_evaluator = val_evaluator
