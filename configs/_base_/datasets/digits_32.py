"""Handwritten digits at 32 px on a plain background, placed anew in every epoch.

1,437 digits to train and 360 others to validate, from scikit-learn; nothing is downloaded.
"""

digits = dict(size=32, background="plain", rotation=10.0, scale=(0.8, 1.0), contrast=(0.4, 0.5))
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="DigitClassification", split="train", **digits),
)
val_dataloader = dict(
    batch_size=180,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="DigitClassification", split="val", **digits),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TopKAccuracy", topk=(1, 5))
test_evaluator = val_evaluator
