"""RWKV-SAM-nano learns to segment a digit from its box or from a click, on a CPU, in minutes.

    python tools/train.py configs/rwkv_sam/rwkv-sam-nano_1xb8-12e_digit-prompts-128.py

Nothing is downloaded. Expected: mIoU 66.5 from boxes, 51.0 from a click (docs/rwkv_sam.md).
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/digit_prompts_128.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    type="PromptableSegmentor",
    model_name="rwkv_sam_nano",
    image_size=128,
    prompts=dict(
        weights=dict(box=2.0, jittered_box=2.0, points=3.0, corrected_points=1.0, noisy_mask=1.0),
        max_points=4,
    ),
    loss=dict(corrections=1, num_points=784),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=12, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=12, val_interval=4)
default_hooks = dict(checkpoint=dict(save_best="sam/box_mIoU"))
