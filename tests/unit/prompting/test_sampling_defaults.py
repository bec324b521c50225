"""What a model's folder says about sampling: read, bounded, and refused with the file and the entry named."""

import json
from pathlib import Path

import pytest

from isthmus.app import sampling_defaults
from isthmus.config import Settings
from isthmus.contracts.errors import ModelInvalid
from isthmus.contracts.sampling import OPENAI_DEFAULTS, SamplingDefaults
from isthmus.execution.prompting.folder import read_sampling_defaults


def write(folder: Path, values: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_the_file_is_optional_and_other_entries_are_left(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == OPENAI_DEFAULTS
    write(tmp_path, {"do_sample": False, "max_new_tokens": 256, "eos_token_id": [6, 1], "temperature": None})
    assert read_sampling_defaults(tmp_path) == OPENAI_DEFAULTS
    write(tmp_path, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.05})
    own = SamplingDefaults(0.6, 20, 0.95, 0.0, 1.05)
    assert read_sampling_defaults(tmp_path) == own
    assert sampling_defaults(Settings(model=str(tmp_path))) == own
    assert sampling_defaults(Settings(model=str(tmp_path), sampling_defaults=False)) == OPENAI_DEFAULTS
    write(tmp_path, {"top_k": -1})
    assert read_sampling_defaults(tmp_path).top_k == 0


@pytest.mark.parametrize(
    ("values", "entry"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ([], "JSON object"),
    ],
)
def test_what_no_request_could_ask_for_is_refused_by_name(tmp_path: Path, values: object, entry: str) -> None:
    write(tmp_path, values)
    with pytest.raises(ModelInvalid, match=entry) as caught:
        read_sampling_defaults(tmp_path)
    assert "generation_config.json" in str(caught.value)
