"""RWKV-SAM-nano learns to segment a digit from its box or from a click, on a CPU, in minutes.

    python tools/train.py configs/rwkv_sam/rwkv-sam-nano_1xb8-9e_digit-prompts-128.py

Nothing is downloaded. Expected: see docs/rwkv_sam.md.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/digit_prompts_128.py",
    "../_base_/schedules/adamw_prompts_nano.py",
]
model = dict(
    type="PromptableSegmentor",
    model_name="rwkv_sam_nano",
    image_size=128,
    prompts=dict(weights=dict(box=2.0, jittered_box=1.0, points=3.0), max_points=2),
    loss=dict(corrections=1, num_points=512, iou_weight=3.0),
)
default_hooks = dict(checkpoint=dict(save_best="sam/box_mIoU"))
custom_hooks = [*_base_.custom_hooks, dict(type="WorstPromptsHook")]
