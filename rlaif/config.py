"""Settings of the RL-CAI stages. Defaults are the paper's (arXiv 2212.08073, section 4; PPO as in 2204.05862)."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from bylaw.model.settings import OptimSettings, SamplingSettings, require, require_cache, require_choices


@dataclass(frozen=True, kw_only=True)
class CompareConfig(SamplingSettings):
    """Two answers to each prompt."""

    max_tokens: int = 256
    """Longest answer."""
    pairs_per_prompt: int = 1
    """Pairs drawn for each prompt."""
    prompts_per_chunk: int = 64
    """Prompts worked on together and written together; what a killed stage does again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "pairs_per_prompt", "prompts_per_chunk"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """The probability that answer A keeps a principle better than answer B."""

    principles: Literal["one", "some", "all"] = "one"
    """One principle drawn for each pair by weight; some, drawn by weight and averaged; or all, averaged by weight."""
    some: int = 4
    """How many principles `some` are."""
    helpful_principle: str = ""
    """Id of a principle that judges the pairs of the recipe's `helpful` prompts, alone, and no others; empty judges
    them as others.
    """
    shots: int = 0
    """Examples shown before each question, drawn anew for each prompt; base models want 3 to 5."""
    thoughts: int = 0
    """Thoughts sampled for each order of each question, whose probabilities are averaged; 0 asks for the letter."""
    max_thought_tokens: int = 256
    """Longest thought."""
    thought_temperature: float = 1.0
    """Sampling temperature of thoughts."""
    clamp: float = 0.4
    """After thoughts, labels are kept from this to 1 less this (the paper: 40 to 60 %); 0 leaves them as they are."""
    min_option_mass: float = 0.02
    """Least probability on the two option letters together, in either order, below which a label abstains."""
    pairs_per_chunk: int = 64
    """Pairs judged together and written together; what a killed stage does again."""
    cache_gib: float = 0.0
    """Memory for keys and values in GiB; 0 chooses: 2 on a CPU, half of the free memory on a GPU."""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("some", "max_thought_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("shots", "thoughts"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 (none) or more")
        require(0 <= self.thought_temperature < math.inf, "thought_temperature", self.thought_temperature, "0 or more")
        require(0 <= self.clamp < 0.5, "clamp", self.clamp, "0 (off) or more, below 0.5")
        require(0 <= self.min_option_mass <= 1, "min_option_mass", self.min_option_mass, "from 0 to 1")
        require(self.pairs_per_chunk >= 1, "pairs_per_chunk", self.pairs_per_chunk, "1 or more")
        require_cache(self.cache_gib)


def is_server(judge: str) -> bool:
    """Whether a recipe's judge is a server's URL."""
    return judge.lower().startswith(("http://", "https://"))


def check_server(url: str) -> None:
    """Raise ValueError for a URL that is no plain https://host:port/path. It is not shown: it may hold a secret."""
    try:
        parts = urlsplit(url)
        plain = bool(parts.hostname) and "@" not in parts.netloc and not parts.query and not parts.fragment
        _ = parts.port
    except ValueError:
        plain = False
    if not plain or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(
            "judge is a URL that cannot be used; allowed: https://HOST/v1 or http://HOST:PORT/v1, without a name, "
            "password, query or fragment: a key comes from the environment variable judge_server.key_variable"
        )


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """A judge behind an OpenAI-compatible server that returns log-probs; its URL is the recipe's `judge`."""

    model: str = ""
    """Name of the model at the server."""
    style: Literal["chat", "continue", "completions"] = "chat"
    """How a reply is begun: chat asks in the last line of the user's turn; continue gives the assistant's turn to go on
    with (vLLM, SGLang); completions sends a plain transcript, for base models.
    """
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; empty, or one that is not set, sends none. The key is written nowhere."""
    timeout_seconds: float = 60.0
    """For one request, from its start to the last byte of the answer."""
    concurrency: int = 8
    """Requests under way together, of each of torchrun's data ranks: several ask so many times as much."""
    retries: int = 10
    """Further attempts at a request that timed out, was cut off, or met an overloaded or failing server."""
    backoff_seconds: float = 0.5
    """Wait before the first further attempt; it doubles with each, and is longer where the server asks for longer."""
    top_logprobs: int = 20
    """Log-probs asked for at the letter's place; some servers give fewer than 20."""

    def __post_init__(self) -> None:
        require_choices(self)
        if not re.fullmatch("([A-Z_][A-Z0-9_]*)?", self.key_variable):  # not shown: it may be the key itself
            raise ValueError("key_variable is not the name of a variable; allowed: capitals, digits and underscores")
        for name in ("timeout_seconds", "backoff_seconds"):
            require(0 < getattr(self, name) <= 86400, name, getattr(self, name), "above 0, up to a day")
        require(1 <= self.concurrency <= 1024, "concurrency", self.concurrency, "1 to 1024")
        require(0 <= self.retries <= 100, "retries", self.retries, "0 to 100")
        require(self.top_logprobs >= 2, "top_logprobs", self.top_logprobs, "2 or more")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(OptimSettings):
    """Reward model on soft labels."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Reward models overfit: the learning rate goes down to 0 over the run."""
    epochs: int = 1
    """Passes over the pairs; more than 1 overfits on real data (arXiv 2403.17031)."""
    batch_size: int = 64
    """Pairs per optimiser step."""
    heldout_fraction: float = 0.1
    """Share of the prompts whose pairs are kept for accuracy, calibration and the score's mean."""
    helpful_ratio: float = 0.0
    """Share of the training pairs that come from the recipe's `helpful_preferences`; held-out pairs have none."""
    hard_labels: bool = False
    """Train on labels rounded to 0 or 1, to compare with soft ones. Records and measures stay soft."""
    margin: float = 0.0
    """How far a sure label (p = 1) wants the scores apart before its loss falls, less sure ones in proportion to 2p - 1
    (arXiv 2307.09288, section 3.2.2); 0 is off.
    """
    centring: float = 0.0
    """Weight of the squared sum of both scores, which draws scores to a mean of 0 (arXiv 2312.09244); 0 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(0 < self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "above 0 and below 1")
        require(0 <= self.helpful_ratio < 1, "helpful_ratio", self.helpful_ratio, "0 (none) or more, below 1")
        for name in ("margin", "centring"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(OptimSettings):
    """Direct preference optimisation of the SL-CAI policy on the soft labels."""

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW (arXiv 2305.18290, appendix B)."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape after the warm-up: constant, or down to 0 in a line or a half cosine."""
    beta: float = 0.1
    """How much a nat of log-prob over the SL-CAI policy's is worth as reward: the larger, the nearer it stays."""
    epochs: int = 1
    """Passes over the pairs."""
    batch_size: int = 64
    """Pairs per optimiser step."""
    heldout_fraction: float = 0.1
    """Share of the prompts whose pairs are kept for measuring."""
    helpful_ratio: float = 0.0
    """Share of the training pairs that come from the recipe's `helpful_preferences`; held-out pairs have none."""
    hard_labels: bool = False
    """Train on labels rounded to 0 or 1, to compare with soft ones. Records and measures stay soft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.beta < math.inf, "beta", self.beta, "above 0")
        require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(0 < self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "above 0 and below 1")
        require(0 <= self.helpful_ratio < 1, "helpful_ratio", self.helpful_ratio, "0 (none) or more, below 1")


AT_LEAST_0 = (
    "kl_coef",
    "kl_target",
    "kl_budget",
    "critic_warmup",
    "missing_eos_penalty",
    "value_learning_rate",
    "value_coef",
    "clip_high",
    "importance_cap",
    "score_clip",
    "min_entropy",
    "collapse_baseline",
)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OptimSettings):
    """PPO against the reward model with a per-token KL penalty to the SL-CAI policy."""

    adam_epsilon: float = 1e-5
    """Added to AdamW's denominator (arXiv 2403.17031)."""
    warmup_steps: int = 0
    """Iterations over which the learning rates rise from 0."""
    save_every: int = 10
    """Iterations between training checkpoints, from which a killed run goes on."""
    iterations: int = 100
    """Rollout batches, each followed by updates."""
    rollouts: int = 64
    """Episodes per iteration."""
    max_tokens: int = 128
    """Longest response."""
    temperature: float = 1.0
    """Sampling temperature; every log-prob of the run is taken at it."""
    max_rows: int = 64
    """Sequences decoded together. Results do not depend on it."""
    cache_gib: float = 0.0
    """Memory for keys and values in GiB; 0 chooses: 2 on a CPU, half of the free memory on a GPU."""
    epochs: int = 1
    """Passes over each rollout batch."""
    minibatches: int = 4
    """Optimiser steps per pass."""
    clip: float = 0.2
    """How far below 1 the policy's ratio is followed."""
    clip_high: float = 0.0
    """How far above 1; 0 is as far as below (arXiv 2503.14476 takes 0.28 with a clip of 0.2)."""
    dual_clip: float = 0.0
    """Bound of the loss of a negative advantage, in advantages (arXiv 1912.09729 takes 3); 0 is none."""
    importance_cap: float = 2.0
    """Cap of the weights that correct what lies between sampler and trainer, token by token; 0 leaves them out."""
    value: Literal["separate", "shared"] = "separate"
    """A value model of its own, or a value head on the policy's trunk: one pass then serves both."""
    value_coef: float = 0.1
    """Weight of the value loss beside the policy loss on a shared trunk."""
    value_clip: float = 0.2
    """Half-width of the value's clip around its old value."""
    value_learning_rate: float = 1e-5
    """Peak learning rate of a separate value model."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Divide the rewards of a batch by their deviation; their mean stays (arXiv 2403.17031: it shortens answers)."""
    kl_coef: float = 0.001
    """Weight of the per-token KL to the SL-CAI policy."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL counts: taken from each token's reward, or added to the loss."""
    kl_estimator: Literal["k2", "k3"] = "k2"
    """Of the KL in the loss; k2 has the gradient of the KL itself."""
    kl_target: float = 0.0
    """With a target above 0 the weight adapts so that the KL per response (nats) meets it; 0 keeps it fixed."""
    kl_horizon: int = 10_000
    """Episodes over which an adaptive weight moves."""
    kl_budget: float = 0.0
    """The run ends when the KL per response (nats) is above this; 0 is no limit."""
    critic_warmup: int = 0
    """Iterations in which only the value model learns."""
    missing_eos_penalty: float = 1.0
    """Taken from the score of a response that did not end by itself."""
    score_stats: Literal["heldout", "running", "none"] = "heldout"
    """What makes scores have mean 0 and deviation 1: held-out answers, all scores of the run so far, or nothing."""
    reward: Literal["model", "judge"] = "model"
    """What scores an answer: the run's reward model, or the recipe's judge by a mark from 1 to 10, for which stages
    compare, label and reward are not needed. Its scores lie from -1 to 1, and score_stats = "heldout" leaves them so.
    Principles and least probability are those of [label].
    """
    rewards: tuple[str, ...] = ()
    """Further reward models beside the run's own, each FOLDER or FOLDER=WEIGHT; the run's own has weight 1."""
    score_clip: float = 0.0
    """Scores are kept within plus and minus this, before the penalty for no end; 0 is no limit."""
    collapse: Literal["ignore", "warn", "stop"] = "warn"
    """What happens when answers show signs of collapse (rlaif/monitor.py)."""
    collapse_baseline: int = 3
    """First iterations whose answers are what later ones are compared with."""
    collapse_rise: float = 0.4
    """Rise above the baseline of the shares of repetition, boilerplate and missing ends that is a sign of collapse."""
    collapse_fall: float = 0.2
    """Fraction of the baseline to which the entropy or the length falls, or 1 over its growth, that is a sign."""
    max_repetition: float = 1.0
    """Share of repeated 4-grams that is a sign in itself."""
    max_boilerplate: float = 1.0
    """Share of answers with one 8-gram in common that is a sign in itself."""
    min_entropy: float = 0.0
    """Entropy per token (nats) that is a sign in itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "rollouts", "max_tokens", "max_rows", "epochs", "minibatches", "kl_horizon"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("clip", "value_clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in AT_LEAST_0:
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more, and finite")
        require_cache(self.cache_gib)
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 (PPO needs a distribution)")
        cap = self.importance_cap
        require(cap == 0 or cap >= 1, "importance_cap", cap, "0 (none), or 1 and above")
        self._check_kl()
        for name in ("gamma", "gae_lambda", "collapse_rise", "collapse_fall", "max_repetition", "max_boilerplate"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        _ = self.further_rewards
        require(self.dual_clip == 0 or self.dual_clip > 1, "dual_clip", self.dual_clip, "0 (none), or above 1")
        require(
            self.minibatches <= self.rollouts, "minibatches", self.minibatches, f"at most rollouts = {self.rollouts}"
        )

    def _check_kl(self) -> None:
        if self.kl_target > 0:
            require(self.kl_coef > 0, "kl_coef", self.kl_coef, "above 0 with kl_target, which multiplies it")
            least = self.rollouts / 5  # below, one iteration could turn the weight's sign
            require(self.kl_horizon > least, "kl_horizon", self.kl_horizon, f"above rollouts / 5 = {least:g}")

    @property
    def further_rewards(self) -> list[tuple[Path, float]]:
        """Folders and weights of `rewards`."""
        found = []
        for written in self.rewards:
            folder, weight = written.rsplit("=", 1) if "=" in written else (written, "1")
            try:
                number = float(weight)
            except ValueError:
                number = math.nan
            allowed = "FOLDER or FOLDER=WEIGHT, a finite number that is not 0"
            require(bool(folder) and math.isfinite(number) and number != 0, "rewards", written, allowed)
            found.append((Path(folder), number))
        return found

    @property
    def clips(self) -> tuple[float, float]:
        """How far below and above 1 the policy's ratio is followed."""
        return self.clip, self.clip_high or self.clip
