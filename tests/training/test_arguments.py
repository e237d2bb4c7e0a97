from __future__ import annotations

import pytest

from graftune.errors import SettingsError
from graftune.training import training_args


def test_defaults_report_nowhere_and_waste_nothing(tmp_path) -> None:
    args = training_args(tmp_path)
    assert args.output_dir == str(tmp_path)
    assert args.report_to == []
    assert args.dataloader_num_workers == 0
    assert args.logging_nan_inf_filter is False
    assert args.save_only_model is False


def test_settings_replace_the_defaults(tmp_path) -> None:
    args = training_args(str(tmp_path), logging_steps=3, learning_rate=0.5)
    assert (args.logging_steps, args.learning_rate) == (3, 0.5)


def test_an_unknown_setting_names_the_nearest(tmp_path) -> None:
    with pytest.raises(SettingsError, match='"learning_rat"\\. Did you mean "learning_rate"'):
        training_args(tmp_path, learning_rat=1)


def test_settings_that_contradict_each_other_are_told(tmp_path) -> None:
    with pytest.raises(SettingsError, match="don't go together"):
        training_args(tmp_path, save_strategy="sometimes")
