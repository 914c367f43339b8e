"""
Optimizers, the learning rate of a step, and how long a run is.
"""

import math

import torch

# ---- lengths and the learning rate ----


def set_lengths(s, per_epoch, per_step):
    """Resolves the settings' lengths into steps: s.max_steps, the horizon of the schedule,
    s.stop_step, where the run ends, s.warmup and s.decay. per_epoch, per_step: tokens or examples
    of an epoch and of a step. SystemExit where the horizon is given twice or not at all, and where
    warmup or decay are given twice."""

    def given(*keys):  # that the script has and that are set
        values = {key: getattr(s, key, None) for key in keys}
        return {key: value for key, value in values.items() if value is not None}

    horizon = given("max_steps", "max_tokens", "num_epochs")
    if len(horizon) != 1:
        shown = ", ".join(f"{key}={value}" for key, value in horizon.items()) or "nothing"
        expected = "one of max_steps, max_tokens or num_epochs"
        advice = "(--num_epochs=None takes back what a config gives)"
        raise SystemExit(f"the length of training: {shown}; expected {expected} {advice}")
    if s.max_steps is None:
        total = s.num_epochs * per_epoch if "num_epochs" in horizon else s.max_tokens
        s.max_steps = math.ceil(total / per_step)
    s.stop_step = s.max_steps if s.stop_step is None else s.stop_step
    if s.stop_step > s.max_steps:
        raise SystemExit(f"stop_step={s.stop_step} lies behind the horizon of {s.max_steps} steps")

    def in_steps(name, default):
        lengths = given(f"{name}_steps", f"{name}_tokens", f"{name}_ratio")
        if len(lengths) > 1:
            raise SystemExit(f"{lengths}: give one of them, not several")
        for key, n in lengths.items():
            if key.endswith("tokens"):
                return round(n / per_step)
            return round(n * s.max_steps) if key.endswith("ratio") else n
        return default

    s.warmup = in_steps("warmup", 0)
    if s.warmup > s.max_steps:
        raise SystemExit(f"warmup ends after {s.warmup:,} steps, the run after {s.max_steps:,}")
    wsd = s.schedule == "wsd"
    s.decay = in_steps("decay", round(0.1 * s.max_steps) if wsd else s.max_steps - s.warmup)


def learning_rate_at(step, s):
    """Learning rate of step 0..max_steps-1: a linear warmup, then from s.learning_rate to s.min_lr
    within s.decay steps, right after the warmup (cosine, linear) or at the end of the horizon (wsd:
    warmup, stable, decay), and s.min_lr from there on.

    What is kept of the difference at t in 0..1: cosine (1 + cos(pi t))/2, linear 1 - t, sqrt
    1 - sqrt(t) (Ettin's "1-sqrt"); s.decay_shape is wsd's."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / s.warmup
    if s.schedule == "constant":
        return s.learning_rate
    start, shape = s.warmup, s.schedule
    if s.schedule == "wsd":
        start, shape = s.max_steps - s.decay, s.decay_shape
    t = min(max(step - start, 0) / max(s.decay, 1), 1.0)
    kept = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "sqrt": 1 - math.sqrt(t)}
    return s.min_lr + (s.learning_rate - s.min_lr) * kept[shape]


# ---- optimizers ----


def make_optimizers(model, s, kind="adamw", zero1=False, decay_all=False):
    """A list: AdamW or StableAdamW, or Muon for the blocks' matrices and AdamW for the rest. Weight
    decay is of tensors with two dimensions or more, or with decay_all of norms and biases, too.
    zero1: the state is shared over the ranks."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = {n: p for n, p in named if kind == "muon" and p.ndim == 2 and "blocks." in n}
    rest = [p for n, p in named if n not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": s.weight_decay * decay_all},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "eps": s.adam_eps}
    cls = StableAdamW if kind == "stable_adamw" else torch.optim.AdamW
    if cls is torch.optim.AdamW:
        settings["fused"] = s.device.type in ("cuda", "cpu")
    if zero1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return [ZeroRedundancyOptimizer(groups, optimizer_class=cls, **settings)]
    optimizers = [cls(groups, **settings)]
    if matrices:  # scaled to AdamW's update size, so that one learning rate serves both
        optimizers.append(torch.optim.Muon(
            matrices.values(), lr=s.learning_rate, weight_decay=s.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ))  # fmt: skip
    return optimizers


def clip_gradients(parameters, max_norm):
    """Scales the gradient down to max_norm (0: it is left alone) -> its norm before that."""
    gnorm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return (gnorm.full_tensor() if hasattr(gnorm, "full_tensor") else gnorm).item()


def update(optimizers, lr):
    """One step of each optimizer at this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


class StableAdamW(torch.optim.Optimizer):
    """AdamW with Adafactor's update clipping (Wortsman et al. 2023, arXiv 2304.13013, section 3.5),
    to be used without gradient clipping. For each tensor, with gradient g and its moments m and v:

        RMS = sqrt(mean(g^2 / max(v, eps^2)))    above 1 when v lags behind a jump of the gradient
        lr_t = lr / max(1, RMS)
        theta -= lr_t * (m / (sqrt(v) + eps) + weight_decay * theta)

    Bias correction is inside the betas: beta_t = beta (1 - beta^(t-1)) / (1 - beta^t). The decay is
    scaled by lr, as in torch's AdamW. ModernBERT's and Ettin's "decoupled" decay is
    lr_t / lr_max * decay, so divide theirs by the peak lr: 1e-5 at lr 8e-4 is 0.0125 here.
    Parameters may be plain or sharded by fully_shard: the RMS is always the whole tensor's."""

    def __init__(self, params, lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            for p, s in zip(params, states):
                if not s:
                    s.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                s["step"] += 1
            # all but the RMS is elementwise: work on this rank's shards
            theta, g = _local(params), _local([p.grad for p in params])
            m, v = (_local([s[name] for s in states]) for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = (
                [b * (1 - b ** (s["step"] - 1)) / (1 - b ** s["step"]) for s in states]
                for b in group["betas"]
            )
            torch._foreach_lerp_(m, g, [1 - b for b in beta1])
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, g, g, [1 - b for b in beta2])
            u = torch._foreach_sqrt(v)  # the one temporary of the parameters' size
            torch._foreach_clamp_min_(u, group["eps"])  # sqrt(max(v, eps^2))
            torch._foreach_reciprocal_(u)
            torch._foreach_mul_(u, g)
            sums = torch.stack(torch._foreach_norm(u)).square()  # [tensors]
            sharded = [i for i, p in enumerate(params) if hasattr(p, "placements")]
            if sharded:  # on one mesh, as fully_shard has them: one all-reduce for all
                from torch.distributed.tensor import DTensor, Partial

                p = params[sharded[0]]
                parts = [Partial() if x.is_shard() else x for x in p.placements]
                total = DTensor.from_local(sums[sharded], p.device_mesh, parts)
                sums[sharded] = total.full_tensor()
            rms = (sums / sums.new_tensor([p.numel() for p in params])).sqrt()

            torch._foreach_copy_(u, v)
            torch._foreach_sqrt_(u)
            torch._foreach_add_(u, group["eps"])
            torch._foreach_reciprocal_(u)
            torch._foreach_mul_(u, m)
            torch._foreach_add_(u, theta, alpha=group["weight_decay"])
            torch._foreach_mul_(u, list((1 / rms.clamp(min=1)).unbind()))  # no synchronisation
            torch._foreach_add_(theta, u, alpha=-group["lr"])


def _local(tensors):
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
