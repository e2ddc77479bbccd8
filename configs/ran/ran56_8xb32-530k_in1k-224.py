"""Attention-56 on ImageNet-1k, the paper's recipe. Paper: 78.24 top-1.

Not run here:

    torchrun --nproc_per_node=8 tools/train.py configs/ran/ran56_8xb32-530k_in1k-224.py \
        --launcher pytorch

With `--cfg-options model.model_name=ranext56` the paper has 78.8, with `ran92`, tested at 320 px,
80.5. The colour augmentation is AlexNet's, with the principal components of each image instead of
those of the whole data set.
"""

_base_ = [
    "../_base_/cls_runtime_iters.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/sgd_530k_in1k.py",
]
model = dict(type="ImageClassifier", model_name="ran56", num_classes=1000)
train_dataloader = dict(
    batch_size=32,
    drop_last=False,
    sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True),
    dataset=dict(
        transform=dict(
            _delete_=True,
            input_size=224,
            no_aug=True,
            albumentations=[
                dict(type="RandomResizedCrop", size=(224, 224)),
                dict(type="HorizontalFlip", p=0.5),
                dict(type="FancyPCA", alpha=0.1, p=1.0),
            ],
        )
    ),
)
tta_model = dict(type="FlipTTA")
