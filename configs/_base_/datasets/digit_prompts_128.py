"""Scenes of a few handwritten digits at 128 px with a mask each, new ones in every epoch.

Nothing is downloaded. Train and validation use other digits and other parts of the photographs.
"""

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(type="DigitPrompts", split="train", size=128, length=1000),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(type="DigitPrompts", split="val", size=128, length=100),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="PromptedMaskIoU")
test_evaluator = val_evaluator
