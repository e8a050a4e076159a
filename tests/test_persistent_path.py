"""Who computes the tokens of a few voices: the table, the setting, what is made ready and what is logged."""

from __future__ import annotations

import logging

import pytest
from persistent_standin import HOPPER, OTHER, StandIn, path_of, request

from soprano_cupy import settings
from soprano_cupy.errors import DeviceError, ParameterError
from soprano_cupy.gpu import persistent_choice
from soprano_cupy.gpu.persistent import VOICES
from soprano_cupy.gpu.persistent_choice import StepTimes, measured_times, reason_against, reason_for

REAL = persistent_choice.STEP_US
TABLE = {
    HOPPER: {
        (1, False): StepTimes(164.0, 120.0),
        (1, True): StepTimes(172.0, 180.0),
        (2, False): StepTimes(177.0, 176.5),
        (4, False): StepTimes(181.0, 208.0),
    }
}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent_choice, "STEP_US", TABLE)


# ---- the setting and the table ----


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPRANO_PERSISTENT", raising=False)
    assert settings.persistent() == "auto"
    for value in ("0", "1", "AUTO"):
        monkeypatch.setenv("SOPRANO_PERSISTENT", value)
        assert settings.persistent() == value.lower()
        assert settings.persistent("1") == "1"
    monkeypatch.setenv("SOPRANO_PERSISTENT", "yes")
    with pytest.raises(ParameterError, match=r"SOPRANO_PERSISTENT = 'yes' .* auto, 0, 1"):
        settings.persistent()


def test_figures_of_the_next_number_that_was_measured() -> None:
    assert measured_times(HOPPER, 1, False) == (164.0, 120.0)
    assert measured_times(HOPPER, 1, True) == (172.0, 180.0)
    assert measured_times(HOPPER, 3, False) == (181.0, 208.0)
    assert measured_times(HOPPER, 2, True) == (177.0, 176.5)  # no figure for drawn ones
    assert measured_times(HOPPER, 5, False) is None
    assert measured_times(OTHER, 1, False) is None


@pytest.mark.parametrize(
    ("voices", "drawn", "reason"),
    [
        (1, False, None),
        (1, True, "faster by measurement, 172 against 180 us"),
        (2, False, None),
        (3, False, "faster by measurement, 181 against 208 us"),
        (8, False, "not measured for 8 voices on compute capability 9.0"),
    ],
)
def test_what_was_measured_decides(voices: int, drawn: bool, reason: str | None) -> None:
    assert reason_against("auto", HOPPER, voices, drawn) == reason
    assert reason_against("1", HOPPER, voices, drawn) is None
    assert reason_against("0", HOPPER, voices, drawn) == "SOPRANO_PERSISTENT=0"


def test_reasons_for() -> None:
    assert reason_for("auto", HOPPER, 1, False) == "faster by measurement, 120 against 164 us"
    assert reason_for("1", OTHER, 1, False) == "SOPRANO_PERSISTENT=1"


def test_the_real_table_is_of_few_voices() -> None:
    for measured in REAL.values():
        assert {voices for voices, _ in measured} <= set(VOICES)
        assert {(1, False), (1, True), (2, False), (4, False)} <= set(measured)
        assert all(20 < us < 1000 for times in measured.values() for us in times)


# ---- the path ----


def test_one_voice_is_made_ready_beside_and_waited_for() -> None:
    decoder = StandIn()
    path = path_of(decoder)
    path.prepare()
    assert path.takes([request()])
    assert decoder.prepared == ["soprano-persistent"]
    assert path.nbytes == 143


@pytest.mark.parametrize(("setting", "capability"), [("0", HOPPER), ("auto", OTHER)])
def test_what_is_not_taken_is_not_made_ready(setting: str, capability: tuple[int, int]) -> None:
    decoder = StandIn()
    path = path_of(decoder, setting, capability)
    path.prepare()
    assert not path.takes([request()])
    assert decoder.prepared == []
    assert path.nbytes == 0


def test_each_decision_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(StandIn())
    with caplog.at_level(logging.INFO, "soprano_cupy.gpu.persistent_path"):
        for _ in range(3):
            assert path.takes([request()])
            assert not path.takes([request(0.7)])
            assert not path.takes([request()] * 3)
    assert [record.message for record in caplog.records] == [
        "1 voice, greedy: the persistent kernel (faster by measurement, 120 against 164 us)",
        "1 voice, drawn: a graph for each token (faster by measurement, 172 against 180 us)",
        "3 voices, greedy: a graph for each token (faster by measurement, 181 against 208 us)",
    ]


def test_the_kernel_has_its_own_reasons(caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(StandIn("only 3 of 4 clusters of 16 blocks run at once"), "1")
    path.prepare()
    with caplog.at_level(logging.INFO):
        assert not path.takes([request()])
    assert path.failure is None
    assert "a graph for each token (only 3 of 4 clusters" in caplog.text
    assert (
        path.describe()[0] == "1 voice, greedy: a graph for each token (only 3 of 4 clusters of 16 blocks run at once)"
    )


@pytest.mark.parametrize("error", [DeviceError("NVRTC refuses"), MemoryError("no memory for the weights")])
def test_a_kernel_that_cannot_be_had_is_one_warning(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    decoder = StandIn()
    decoder.reason = error  # type: ignore[assignment]
    path = path_of(decoder, "1")
    path.prepare()
    assert not path.takes([request()])
    assert not path.takes([request()])
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        f"the persistent decode kernel is off from now on, graphs take over: {error}"
    ]
    assert path.describe() == [f"1 voice, greedy: a graph for each token ({error})"]


def test_a_lost_context_is_not_hidden() -> None:
    decoder = StandIn()
    lost = DeviceError("the context is gone")
    lost.sticky = True
    decoder.reason = lost  # type: ignore[assignment]
    with pytest.raises(DeviceError, match="gone"):
        path_of(decoder, "1").takes([request()])


def test_descriptions() -> None:
    assert path_of(StandIn()).describe()[:3] == [
        "1 voice, greedy: the persistent kernel (faster by measurement, 120 against 164 us)",
        "1 voice, drawn: a graph for each token (faster by measurement, 172 against 180 us)",
        "2 voices, greedy: the persistent kernel (faster by measurement, 176 against 177 us)",
    ]
    assert path_of(StandIn(), "0").describe() == ["1 voice, greedy: a graph for each token (SOPRANO_PERSISTENT=0)"]


def test_another_setting_for_measurements() -> None:
    path = path_of(StandIn(), "0")
    assert not path.takes([request()])
    path.use("1")
    assert path.takes([request()] * 4)
    path.use("auto")
    assert not path.takes([request()] * 4)
