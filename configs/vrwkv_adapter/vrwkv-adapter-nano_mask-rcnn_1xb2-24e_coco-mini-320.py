"""VRWKV-nano with an adapter and a small Mask R-CNN on 70 images of COCO, for a CPU.

    python tools/train.py \
        configs/vrwkv_adapter/vrwkv-adapter-nano_mask-rcnn_1xb2-24e_coco-mini-320.py \
        --cfg-options data_root=/path/to/coco_mini/

To see that it learns, let it fit 8 images and judge it on these:

    --cfg-options train_dataloader.dataset.indices=8 val_dataloader.dataset.indices=8 \
        val_dataloader.dataset.ann_file=annotations/instances_train.json \
        val_dataloader.dataset.data_prefix.img=train/
"""

_base_ = [
    "../_base_/det_runtime.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/mini_detection_320.py",
    "../_base_/schedules/adamw_1x_det.py",
]
width = 64
model = dict(
    backbone=dict(model_name="vrwkv_adapter_nano", flavour="detection", img_size=(320, 320)),
    neck=dict(in_channels=[64, 64, 64, 64], out_channels=width),
    rpn_head=dict(in_channels=width, feat_channels=width, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=dict(in_channels=width, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=width),
        mask_head=dict(in_channels=width, conv_out_channels=width),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300), rcnn=dict(sampler=dict(num=128))
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3), paramwise_cfg=dict(decay_rate=1.0), clip_grad=dict(max_norm=5.0)
)
max_epochs = 24
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        begin=1,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=max_epochs, val_interval=8)
