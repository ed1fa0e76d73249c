from nepa_dist.trained import load_trained


def transfer(task, source, *, ema):
    t = load_trained(source, ema=ema)
    missing = task.backbone.load_state_dict(t.task.backbone.state_dict())
    return f"backbone from {source}: {t.origin}"
