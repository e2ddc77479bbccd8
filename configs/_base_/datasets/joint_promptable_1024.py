"""RWKV-SAM's joint training data at 1024 px (stage 2, arXiv:2406.19369), four sets of masks.

Sizes, repeats and ratios are those of the published data file: COCONut-B things once (233,960
images), EntitySeg at low resolution four times (31,913), DIS5K-TR forty times (3,000, resized and
padded only), one per cent of SA-1B once (111,860, at most 30 masks an image). Evaluation is on the
four sets of fine masks (arXiv:2306.01567).

Folders below `data_root`: DIS5K and thin_object_detection as published, the names of the others are
ours; coconut/images holds, or links to, the files of COCO's train2017 and unlabeled2017.
"""

data_root = "data"
train_dataloader = dict(
    batch_size=4,
    num_workers=8,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="worker_init_fn"),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(
        type="PromptableDataset",
        data_root=data_root,
        sets=[
            dict(
                type="PanopticPngs",
                annotations="coconut/annotations/coconut_b.json",
                images="coconut/images",
                pngs="coconut/coconut_b",
                name="COCONut-B",
                transform=dict(type="LargeScaleJitter", size=1024, ratio=(0.1, 2.0), flip=0.5),
            ),
            dict(
                type="PanopticPngs",
                annotations="entityseg/annotations/panoptic_lr_train.json",
                images="entityseg/images_lr",
                pngs="entityseg/panoptic_lr_train",
                things_only=False,
                name="EntitySeg",
                transform=dict(type="LargeScaleJitter", size=1024, ratio=(0.8, 2.0), flip=0.5),
            ),
            dict(
                type="MaskPairs",
                images="DIS5K/DIS-TR/im",
                masks="DIS5K/DIS-TR/gt",
                name="DIS5K-TR",
                transform=dict(type="ResizeAndPad", size=1024),
            ),
            dict(
                type="Sa1b",
                folder="sa-1b",
                max_masks=30,
                min_area=1 / 64,
                name="SA-1B",
                transform=dict(type="LargeScaleJitter", size=1024, ratio=(1.0, 1.5), flip=0.5),
            ),
        ],
        repeats=[1, 4, 40, 1],
        max_masks=60,
    ),
)
thin = "thin_object_detection"
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="pseudo_collate"),
    dataset=dict(
        type="PromptableDataset",
        data_root=data_root,
        sets=[
            dict(
                type="MaskPairs",
                images="DIS5K/DIS-VD/im",
                masks="DIS5K/DIS-VD/gt",
                name="DIS5K-VD",
            ),
            dict(
                type="MaskPairs",
                images=f"{thin}/COIFT/images",
                masks=f"{thin}/COIFT/masks",
                name="COIFT",
            ),
            dict(
                type="MaskPairs",
                images=f"{thin}/HRSOD/images",
                masks=f"{thin}/HRSOD/masks_max255",
                name="HRSOD",
            ),
            dict(
                type="MaskPairs",
                images=f"{thin}/ThinObject5K/images_test",
                masks=f"{thin}/ThinObject5K/masks_test",
                name="ThinObject5K-TE",
            ),
        ],
        max_masks=None,
        strict=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="PromptedMaskIoU")
test_evaluator = val_evaluator
