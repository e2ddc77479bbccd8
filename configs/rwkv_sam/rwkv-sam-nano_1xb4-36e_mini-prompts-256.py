"""RWKV-SAM-nano learns real objects from boxes and clicks, at 256 px, on a CPU.

    python tools/train.py configs/rwkv_sam/rwkv-sam-nano_1xb4-36e_mini-prompts-256.py \
        --cfg-options data_root=/path/to/data model.checkpoint=/path/to/digits.pth

`digits.pth` is what rwkv-sam-nano_1xb8-9e_digit-prompts-128.py gave; from random weights, 220
images are too few for it to learn that an object fills its box. Expected: see docs/rwkv_sam.md.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/mini_prompts_256.py",
    "../_base_/schedules/adamw_prompts_nano.py",
]
model = dict(
    type="PromptableSegmentor",
    model_name="rwkv_sam_nano",
    image_size=640,  # to judge; training sees parts of such images
    prompts=dict(weights=dict(box=4.0, jittered_box=1.0, points=1.0), max_points=2),
    loss=dict(corrections=1, num_points=3136),
    # The boxes are tight, which the filled box and GrabCut beside it make use of.
    evaluation=dict(clicks=(1,), targets=(), clip_to_box=True),
)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=36, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=36, val_interval=12)
default_hooks = dict(checkpoint=dict(save_best="sam/box_mIoU"))
custom_hooks = [*_base_.custom_hooks, dict(type="WorstPromptsHook")]
