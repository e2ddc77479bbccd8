"""What every run shares: registries, hooks, logging. Made for classification by epochs."""

custom_imports = dict(imports=["vision.mm"], allow_failed_imports=False)
default_scope = "mmseg"
env_cfg = dict(cudnn_benchmark=True, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
randomness = dict(seed=0)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="AtomicCheckpointHook",
        interval=1,
        max_keep_ckpts=2,
        save_best="accuracy/top1",
        rule="greater",
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [
    dict(type="ExactResumeHook"),
    dict(type="InterruptHook"),
    dict(type="TrainingCurveHook"),
    dict(type="PredictionSheetHook"),
]
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(by_epoch=True)
log_level = "INFO"
load_from = None
resume = False
