"""RL-CAI: pairs, AI labels, reward model and PPO."""
