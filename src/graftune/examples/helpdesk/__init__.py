"""Messages to the help-desk of a fictitious product, each with its intent.

README.md beside this file defines the intents and says how the messages were made.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["LABELS", "TEST", "TRAIN", "VALIDATION"]

TRAIN = Path(__file__).with_name("train.jsonl")
"""Messages to learn from; rows of `text` and `label`."""
VALIDATION = Path(__file__).with_name("validation.jsonl")
"""Messages to choose settings and checkpoints by."""
TEST = Path(__file__).with_name("test.jsonl")
"""Messages held out to the end."""
LABELS = (
    "account-access",
    "alert-settings",
    "before-buying",
    "billing-question",
    "calibration-help",
    "cancel-plan",
    "change-delivery",
    "connection-lost",
    "damaged-item",
    "delivery-status",
    "firmware-update",
    "pairing-failure",
    "refund",
    "share-access",
    "wrong-reading",
)
"""The intents, in alphabetical order."""
