"""Each kind of step has one way into a recording and one back."""

from __future__ import annotations

from typing import get_args

from tcpstuck_bpf.recording.codecs import CODECS
from tcpstuck_bpf.steps import Step


def test_every_kind_of_step_has_one_codec_with_a_key_of_its_own() -> None:
    assert [codec.kind for codec in CODECS] == list(dict.fromkeys(c.kind for c in CODECS))
    assert {codec.kind for codec in CODECS} == set(get_args(Step))
    keys = [codec.key for codec in CODECS]
    assert len(keys) == len(set(keys))
