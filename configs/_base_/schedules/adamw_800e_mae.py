"""Vision-RWKV's schedule of masked pretraining: 800 epochs, batch 4096, AdamW, cosine."""

optim_wrapper = dict(
    type="OptimWrapper",
    # 1.5e-4 for 256 images.
    optimizer=dict(type="AdamW", lr=2.4e-3, weight_decay=0.05, betas=(0.9, 0.95)),
    accumulative_counts=4,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=10, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=0,
        begin=10,
        end=800,
        T_max=790,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=800, val_interval=20)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
# lr is for 4096 images a step; tools/train.py does not scale it by itself.
auto_scale_lr = dict(base_batch_size=4096, enable=False)
