"""587 real photographs of three small sets and CamVid at 128 px, without labels; see docs/mae.md.

Any folders of images will do: `data_prefix` names them, below `data_root`.
"""

data_root = "data"
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="UnlabelledImages",
        data_root=data_root,
        data_prefix=dict(
            coco="coco_mini/train",
            people="mask_pairs/ccp_person/train/images",
            plants="mask_pairs/cwfid_plants/train/images",
            streets="camvid/img_dir/train",
        ),
        transform=dict(
            input_size=128, scale=(0.2, 1.0), interpolation="bicubic", color_jitter=None
        ),
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="UnlabelledImages",
        data_root=data_root,
        data_prefix=dict(
            coco="coco_mini/val",
            people="mask_pairs/ccp_person/val/images",
            plants="mask_pairs/cwfid_plants/val/images",
            streets="camvid/img_dir/val",
        ),
        test_mode=True,
        transform=dict(input_size=128, interpolation="bicubic", crop_pct=1.0),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="ReconstructionError")
test_evaluator = val_evaluator
