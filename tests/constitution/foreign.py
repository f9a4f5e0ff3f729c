"""Files in the forms of others, written by hand, and what reads them."""

import json
from pathlib import Path
from typing import Any

from bylaw.constitution.imports import import_constitution
from bylaw.constitution.load import parse_constitution
from bylaw.constitution.schema import Constitution
from bylaw.constitution.write import dump_constitution

CRITIQUES = {
    "polite0": {
        "prompt": ["\n\nCritiqueRequest: Say where the answer is rude, {braces} and all.\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Make the answer polite.\n\nRevision:",
    },
    "polite1": {
        "prompt": ["\n\nCritiqueRequest: Does it shout?\n\nIf so, where?\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Write it without shouting.\n\nRevision:",
    },
}
COMPARISONS = ["\nWhich answer is calmer? Options:", "\nChoose the kinder {one}. Options:"]
CHAT = [
    {"role": "user", "content": "What is a weir?"},
    {"role": "assistant", "content": "Look it up yourself."},
    {"role": "user", "content": "Say where the answer is rude."},
    {"role": "assistant", "content": "It sends the person away."},
    {"role": "user", "content": "Make the answer polite."},
    {"role": "assistant", "content": "A low dam across a river."},
]
HUGGING_FACE = {
    "constitutions": [
        {"critic": "Say where the answer is rude.", "revision": "Make the answer polite."},
        {"critic": "Is it {long}?", "revision": "Shorten it."},
    ],
    "system_chat": [CHAT],
}
CHAIN = {
    "comparison_dataset": "ours",
    "rl_prompt": "\n\nHuman: Hello.\n\nAssistant: Good day.\n\nHuman: What is a weir?\n\nAssistant:",
    "initial_response": [{"sample": " Look it up yourself."}],
    "cst": [
        {
            "cst_key": key,
            "cst_value": CRITIQUES[key],
            "critique": {"sample": f" {key} says that it is rude."},
            "revision": {"sample": f" A low dam, by {key}."},
        }
        for key in ("polite1", "polite0", "polite1")
    ],
}
FEW_SHOT = (
    "\n\nHuman: {question}\n\nAssistant: Look it up.\n\nCritiqueRequest: Is it rude?\n\nCritique: It is.\n\n"
    "RevisionRequest: Make it polite.\n\nRevision: A low dam.\n\nHuman:"
)
THOUGHT = (
    "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):\n\nH: What is a weir?\n\n"
    "{}\n (A) [[[Look it up.]]]\n (B) [[[A low dam.]]]\n\nAssistant: Let's think step by step: (A) sends {him} away; "
    "so option B is better.\n\nHuman:\nSo the answer is: (B)"
)


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def imported(folder: Path, name: str, content: Any) -> Constitution:
    """Read, and then through TOML, as the command does it."""
    constitution = import_constitution([write(folder, name, content)]).constitution
    back = parse_constitution(dump_constitution(constitution), "back")
    assert back == constitution
    return back
