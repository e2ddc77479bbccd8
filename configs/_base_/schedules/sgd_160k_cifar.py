"""The CIFAR schedule of arXiv:1704.06904: 160,000 iterations of SGD, steps at 64,000 and 96,000."""

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
)
param_scheduler = [
    dict(type="MultiStepLR", milestones=[64_000, 96_000], gamma=0.1, by_epoch=False),
]
train_cfg = dict(type="ExactIterBasedTrainLoop", max_iters=160_000, val_interval=4000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
