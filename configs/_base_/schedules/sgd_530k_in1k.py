"""The ImageNet schedule of arXiv:1704.06904: 530,000 iterations of SGD, three steps.

The paper names neither batch nor weight decay. 1e-4 is that of its CIFAR runs; 256 images a step
make 106 epochs.
"""

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [
    dict(type="MultiStepLR", milestones=[200_000, 400_000, 500_000], gamma=0.1, by_epoch=False),
]
train_cfg = dict(type="ExactIterBasedTrainLoop", max_iters=530_000, val_interval=10_000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
# lr is for 256 images a step; tools/train.py does not scale it by itself.
auto_scale_lr = dict(base_batch_size=256, enable=False)
