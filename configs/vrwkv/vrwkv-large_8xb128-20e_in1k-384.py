"""VRWKV-L, fine-tuned from ImageNet-22k to 1k at 384 px. Published top-1: 86.0 (not run here).

The weights come from the hub (vrwkv_l_in22k_192.pth); without a network set
`model.checkpoint=/path/to/vrwkv_l_in22k_192.pth`.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/vrwkv/vrwkv-large_8xb128-20e_in1k-384.py --launcher pytorch --amp
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/adamw_300e_in1k.py",
]
model = dict(
    type="ImageClassifier",
    model_name="vrwkv_large_patch16_192.in22k",
    num_classes=1000,
    checkpoint="published",
    drop_path_rate=0.1,
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.5, switch_prob=0.0),
    grad_checkpointing=True,
)
tta_model = dict(type="FlipTTA")
# No RandAugment, no erasing: crop and flip alone.
train_dataloader = dict(
    dataset=dict(
        transform=dict(_delete_=True, input_size=384, interpolation="bicubic", color_jitter=None)
    )
)
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-5), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=2, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-7,
        begin=2,
        end=20,
        T_max=18,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=20, val_interval=1)
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=1e-4),
]
