"""PPO's update on a softmax-linear policy, written out token by token in float64 NumPy: slow, and plain to read.

Nothing here is shared with the trainer. The policy is a pair (table [V, H], head [V, H]): the state of a token is the
table's row of the token before, its logits are head @ state / temperature. A value model is (table, head [1, H]); on a
shared trunk the table is the policy's, one array. An episode is a dict of its tokens' numbers [n]: `before` and `y`,
the tokens before each and drawn; `sampler` and `reference`, log-probs; and its `score`.
"""

from typing import Any

import numpy as np

Array = np.ndarray
Episode = dict[str, Any]
Model = tuple[Array, Array]


def log_softmax(logits: Array) -> Array:
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


def logprobs(policy: Model, e: Episode, temperature: float) -> Array:
    table, head = policy
    pairs = zip(e["before"], e["y"], strict=True)
    return np.array([log_softmax(head @ table[before] / temperature)[token] for before, token in pairs])


def entropies(policy: Model, e: Episode, temperature: float) -> Array:
    table, head = policy
    rows = [log_softmax(head @ table[before] / temperature) for before in e["before"]]
    return np.array([-(np.exp(row) * row).sum() for row in rows])


def values(value: Model, e: Episode) -> Array:
    table, head = value
    return np.array([float(head[0] @ table[before]) for before in e["before"]])


def rewards(episode: Episode, old: Array, kl_coef: float) -> Array:
    """-kl_coef * (log old - log reference) at each token, and the score at the last."""
    out = [-kl_coef * (old[t] - episode["reference"][t]) for t in range(len(old))]
    out[-1] += episode["score"]
    return np.array(out)


def gae(reward: Array, value: Array, gamma: float, lam: float) -> tuple[Array, Array]:
    """By the sum in equation 16 of arXiv 1506.02438, not by recursion."""
    n = len(reward)
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
    advantage = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    return np.array(advantage), np.array(advantage) + value


def whiten(pieces: list[Array], shift_mean: bool) -> list[Array]:
    """Over all tokens of all episodes, with the biased variance."""
    flat = [float(x) for piece in pieces for x in piece]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / len(flat)
    rest = 0.0 if shift_mean else mean
    return [np.array([(x - mean) / np.sqrt(variance + 1e-8) + rest for x in piece]) for piece in pieces]


def prepare(episodes: list[Episode], policy: Model, value: Model, config: Any, kl_coef: float) -> None:
    """Old log-probs and values, rewards, advantages, returns and importance weights of each episode, in place."""
    for e in episodes:
        e["old"], e["value"] = logprobs(policy, e, config.temperature), values(value, e)
        e["reward"] = rewards(e, e["old"], kl_coef if config.kl_in == "reward" else 0.0)
    if config.whiten_rewards:
        for e, piece in zip(episodes, whiten([e["reward"] for e in episodes], False), strict=True):
            e["reward"] = piece
    for e in episodes:
        e["advantage"], e["return"] = gae(e["reward"], e["value"], config.gamma, config.gae_lambda)
    for e, piece in zip(episodes, whiten([e["advantage"] for e in episodes], True), strict=True):
        e["advantage"] = piece
        cap = config.importance_cap
        e["weight"] = np.minimum(np.exp(e["old"] - e["sampler"]), cap) if cap else np.ones(len(piece))


def policy_token(new: float, e: Episode, t: int, config: Any) -> tuple[float, bool, bool]:
    """The loss of one token; and which clip cuts it."""
    ratio, advantage = float(np.exp(new - e["old"][t])), float(e["advantage"][t])
    low, high = 1 - config.clip, 1 + (config.clip_high or config.clip)
    gain = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    clipped, dual = gain < ratio * advantage, False
    if config.dual_clip and advantage < 0 and gain < config.dual_clip * advantage:
        gain, clipped, dual = config.dual_clip * advantage, False, True
    return -float(e["weight"][t]) * gain, clipped, dual


def kl_token(new: float, reference: float, estimator: str) -> float:
    gap = new - reference
    return 0.5 * gap * gap if estimator == "k2" else float(np.exp(-gap)) - 1 + gap


def value_token(new: float, old: float, target: float, clip: float) -> float:
    clipped = min(max(new, old - clip), old + clip)
    return 0.5 * max((new - target) ** 2, (clipped - target) ** 2)


def losses(
    episodes: list[Episode], policy: Model, value: Model, config: Any, kl_coef: float, tokens: int
) -> dict[str, float]:
    """Policy, KL and value loss of these episodes, sums over their tokens divided by `tokens`, and shares of clips."""
    total = dict.fromkeys(("policy", "kl", "value", "clipped", "dual"), 0.0)
    for e in episodes:
        new, now = logprobs(policy, e, config.temperature), values(value, e)
        for t in range(len(e["y"])):
            lost, clipped, dual = policy_token(new[t], e, t, config)
            total["policy"] += lost
            total["clipped"] += clipped
            total["dual"] += dual
            if config.kl_in == "loss":
                total["kl"] += kl_coef * kl_token(new[t], e["reference"][t], config.kl_estimator)
            total["value"] += value_token(now[t], e["value"][t], e["return"][t], config.value_clip)
    return {name: x / tokens for name, x in total.items()}


def gradient(function: Any, x: Array, step: float = 1e-6) -> Array:
    """By central differences."""
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        kept = x[place]
        x[place] = kept + step
        above = function()
        x[place] = kept - step
        out[place] = (above - function()) / (2 * step)
        x[place] = kept
    return out


def adamw(weights: list[Array], grads: list[Array], state: dict[Any, Any], rate: float, config: Any) -> None:
    """One step of arXiv 1711.05101, algorithm 2, in place, on gradients clipped to the global norm."""
    norm = np.sqrt(sum((grad**2).sum() for grad in grads))
    state["t"] = t = state.get("t", 0) + 1
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        grad = grad * min(1.0, config.max_grad_norm / (norm + 1e-6))
        m, v = state.get(i, (0.0, 0.0))
        m, v = config.beta1 * m + (1 - config.beta1) * grad, config.beta2 * v + (1 - config.beta2) * grad**2
        state[i] = m, v
        root = np.sqrt(v / (1 - config.beta2**t)) + config.adam_epsilon
        weight -= rate * (m / (1 - config.beta1**t) / root + config.weight_decay * weight)
