"""CamVid at half size (240 x 180), for a CPU; masks are compared at full size (480 x 360)."""

data_root = "data/camvid"
dataset_type = "CamVidDataset"
train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadMask", num_classes=11),
    # Nearly the whole image: road below and sky above are half of the answer.
    dict(type="RandomResize", scale=(240, 180), ratio_range=(1.0, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(180, 240)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="Resize", scale=(240, 180), keep_ratio=True),
    # After the resize: the annotation keeps its size, predictions are enlarged to it.
    dict(type="LoadMask", num_classes=11),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="img_dir/train", seg_map_path="ann_dir/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="img_dir/val", seg_map_path="ann_dir/val"),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"], prefix="seg")
test_evaluator = val_evaluator
