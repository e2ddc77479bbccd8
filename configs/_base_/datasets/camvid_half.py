"""CamVid at half size (240 x 180), for a CPU; masks are compared at full size (480 x 360)."""

_base_ = "./camvid.py"
train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadMask", num_classes=11),
    # Nearly the whole image: road below and sky above are half of the answer.
    dict(type="RandomResize", scale=(240, 180), ratio_range=(1.0, 1.5), keep_ratio=True),
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
tta_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(240, 180), keep_ratio=True)],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadMask", num_classes=11)],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
