"""Whatever a path is called, PowerShell reads it as that path and nothing else."""

import runpy
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from kenaz_drivers.contract import DriverError
from kenaz_drivers.hyperv.scripts import SINGLE_QUOTES, quoted, remove, watch

STANDIN = Path(__file__).parents[1] / "integration/standins/powershell.py"
tokens = runpy.run_path(str(STANDIN), run_name="standin")["tokens"]

HOSTILE = st.text(st.sampled_from(f'{SINGLE_QUOTES}a "$`;(){{}}|&\n\\'), max_size=20) | st.text(max_size=40)


@given(HOSTILE)
@example("'; Remove-Item C:\\ -Recurse; '")
@example("\u2019; Stop-Computer; \u2018")
@example("$(Stop-Computer)")
def test_a_text_stays_a_text(text):
    try:
        script = f"New-VM -Path {quoted(text)} -NoVHD"
    except DriverError:
        assert "\0" in text
        return
    assert list(tokens(script)) == [
        ("word", "New-VM"),
        ("word", "-Path"),
        ("text", text),
        ("word", "-NoVHD"),
    ]


@given(HOSTILE)
def test_what_is_no_id_and_no_name_of_ours_goes_into_no_script(text):
    for make in (watch, remove):
        try:
            make(text)
        except DriverError:
            continue
        raise AssertionError(text)
