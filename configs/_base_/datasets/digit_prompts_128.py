"""Scenes of a few handwritten digits at 128 px with a mask each, new ones in every epoch.

Nothing is downloaded. Train and validation use other digits and other parts of the photographs.
"""

scenes = dict(size=128, num_digits=(1, 4), scale=(0.3, 0.6), contrast=(0.35, 0.5), min_visible=0.9)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(type="DigitPrompts", split="train", length=1000, **scenes),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(type="DigitPrompts", split="val", length=100, **scenes),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="PromptedMaskIoU")
test_evaluator = val_evaluator
