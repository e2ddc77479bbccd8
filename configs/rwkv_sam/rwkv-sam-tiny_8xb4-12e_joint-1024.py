"""RWKV-SAM's tiny model on the joint data of stage 2.

The data are the published ones. Optimiser, batch, schedule and which modules train are not: AdamW
with 1e-4 is that of stage 1, the rest is our choice, with all modules trained. No published figure;
not run here.

    torchrun --nproc_per_node=8 tools/train.py \
        configs/rwkv_sam/rwkv-sam-tiny_8xb4-12e_joint-1024.py --launcher pytorch --amp \
        --cfg-options data_root=/path/to/data model.checkpoint=/path/to/stage1.pth

It starts from the encoder and neck that stage 1 distilled; without a checkpoint, from random ones.
`model.frozen="['encoder']"` leaves the encoder as it is.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/datasets/joint_promptable_1024.py",
    "../_base_/schedules/adamw_epochs.py",
]
model = dict(
    type="PromptableSegmentor",
    model_name="rwkv_sam_tiny",
    checkpoint=None,
    parts=["encoder", "neck"],
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=0, end=12, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=12, val_interval=1)
default_hooks = dict(checkpoint=dict(save_best="sam/box_mIoU"))
