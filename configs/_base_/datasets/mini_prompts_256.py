"""Three small sets of real images with object masks, at 256 px for training on a CPU.

Persons (ccp_person, 120 images to train), field plants with thin leaves (cwfid_plants, 30) and
objects of COCO (coco_mini, 70); validation is on 30, 8 and 40 others at their own size.
"""

data_root = "data"
pairs = "mask_pairs"
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(
        type="PromptableDataset",
        data_root=data_root,
        sets=[
            dict(
                type="MaskPairs",
                images=f"{pairs}/ccp_person/train/images",
                masks=f"{pairs}/ccp_person/train/masks",
                name="ccp_person",
            ),
            dict(
                type="MaskPairs",
                images=f"{pairs}/cwfid_plants/train/images",
                masks=f"{pairs}/cwfid_plants/train/masks",
                name="cwfid_plants",
            ),
            dict(
                type="CocoInstances",
                annotations="coco_mini/annotations/instances_train.json",
                images="coco_mini/train",
                name="coco_mini",
            ),
        ],
        repeats=[1, 2, 3],
        transform=dict(type="LargeScaleJitter", size=256, ratio=(0.75, 3.5), flip=0.5, colour=0.2),
        max_masks=8,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(
        type="PromptableDataset",
        data_root=data_root,
        sets=[
            dict(
                type="MaskPairs",
                images=f"{pairs}/ccp_person/val/images",
                masks=f"{pairs}/ccp_person/val/masks",
                name="ccp_person",
            ),
            dict(
                type="MaskPairs",
                images=f"{pairs}/cwfid_plants/val/images",
                masks=f"{pairs}/cwfid_plants/val/masks",
                name="cwfid_plants",
            ),
            dict(
                type="CocoInstances",
                annotations="coco_mini/annotations/instances_val.json",
                images="coco_mini/val",
                name="coco_mini",
            ),
        ],
        max_masks=None,
        strict=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="PromptedMaskIoU")
test_evaluator = val_evaluator
