"""CIFAR-10 as torchvision reads it, with the augmentation of arXiv:1704.06904.

Four pixels of zeros around, a crop of 32 px, a flip. To fetch the data:

    python -c "from torchvision.datasets import CIFAR10; CIFAR10('data/cifar10', download=True)"
"""

data_root = "data/cifar10"
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="LabelledImages",
        data_root=data_root,
        split="train",
        name="torch/cifar10",
        num_classes=10,
        transform=dict(
            input_size=32,
            no_aug=True,
            albumentations=[
                dict(type="PadIfNeeded", min_height=40, min_width=40, border_mode=0, fill=0),
                dict(type="RandomCrop", height=32, width=32),
                dict(type="HorizontalFlip", p=0.5),
            ],
        ),
    ),
)
val_dataloader = dict(
    batch_size=200,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="LabelledImages",
        data_root=data_root,
        split="test",
        name="torch/cifar10",
        num_classes=10,
        test_mode=True,
        transform=dict(input_size=32, crop_pct=1.0),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TopKAccuracy", topk=(1, 5))
test_evaluator = val_evaluator
