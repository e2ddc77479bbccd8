"""Scenes of many handwritten digits at 128 px on photographs, new ones in every epoch.

11 classes, background and ten digits; nothing is downloaded. Train and validation use other digits
and other parts of the photographs.
"""

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    dataset=dict(
        type="DigitSceneSegmentation",
        split="train",
        size=128,
        length=1000,
        pipeline=[dict(type="PhotoMetricDistortion"), dict(type="PackSegInputs")],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="DigitSceneSegmentation",
        split="val",
        size=128,
        length=100,
        pipeline=[dict(type="PackSegInputs")],
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"], prefix="seg")
test_evaluator = val_evaluator
