"""Which drivers there are, and what `auto` means."""

from importlib.metadata import EntryPoint

import pytest

from kenaz_drivers import registry
from kenaz_drivers.contract import Capabilities, DriverError, Reason


def test_our_own_drivers_are_installed_and_load():
    assert {"process", "qemu", "simulated"} <= set(registry.driver_names())
    for name in ("process", "qemu", "simulated"):
        driver = registry.load(name)
        assert driver.name == name
        assert driver.options_schema["additionalProperties"] is False


def test_a_typing_error_gets_a_suggestion():
    with pytest.raises(DriverError, match="no driver 'qmeu'") as caught:
        registry.load("qmeu")
    assert caught.value.hint.startswith("did you mean qemu? installed: ")
    with pytest.raises(DriverError) as caught:
        registry.load("zzzzzz")
    assert caught.value.hint.startswith("installed: ")


def test_the_options_schemas_are_schemas_and_describe_everything():
    import jsonschema

    def look(schema):
        if "properties" in schema:
            for each in schema["properties"].values():
                assert {"title", "description", "examples"} <= set(each) or "properties" in each
                look(each)
        if "items" in schema:
            look(schema["items"])

    for name in ("process", "qemu", "simulated"):
        schema = registry.load(name).options_schema
        jsonschema.Draft202012Validator.check_schema(schema)
        look(schema)


class Fake:
    """A third party's driver, as far as the registry knows it."""

    capabilities = None

    async def probe(self, arch, options):
        if isinstance(self.capabilities, Exception):
            raise self.capabilities
        return self.capabilities


def make(name, *, usable=True, accelerator="kvm", mend="", probe_error=None):
    found = Capabilities(usable, (Reason(usable, name, mend),), "x86_64", accelerator)
    return type(name.title(), (Fake,), {"name": name, "capabilities": probe_error or found})


@pytest.fixture
def installed(monkeypatch):
    """Installs classes, or exceptions that their import raises, as drivers."""

    def install(**drivers):
        class Entry:
            dist = None

            def __init__(self, name, thing):
                self.name, self.thing = name, thing
                self.value = f"other_{name}:Driver"

            def load(self):
                if isinstance(self.thing, Exception):
                    raise self.thing
                return self.thing

        entries = [Entry(name, thing) for name, thing in drivers.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)

    return install


async def choice():
    driver, capabilities, considered = await registry.choose("x86_64", {})
    return driver.name, capabilities.accelerator, [name for name, _ in considered]


async def test_hardware_beats_emulation_and_ends_the_search(installed):
    installed(libvirt=make("libvirt"), qemu=make("qemu", accelerator="tcg"), acme=make("acme"))
    assert await choice() == ("libvirt", "kvm", ["qemu", "libvirt"])


async def test_what_does_not_fit_the_session_is_passed_over_and_says_why(installed):
    installed(hyperv=make("hyperv", accelerator="hyperv"), qemu=make("qemu", accelerator="tcg"))
    reason = Reason(False, "boots no kernel")
    driver, _, considered = await registry.choose(
        "x86_64", {}, lambda capabilities: reason if capabilities.accelerator == "hyperv" else None
    )
    assert driver.name == "qemu"
    assert not considered[0][1].usable
    assert reason in considered[0][1].reasons


async def test_emulation_beats_the_process_which_is_not_even_asked(installed):
    installed(process=make("process", accelerator="none"), qemu=make("qemu", accelerator="tcg"))
    assert await choice() == ("qemu", "tcg", ["qemu"])


async def test_the_process_is_the_last_resort_and_simulated_is_none(installed):
    installed(
        simulated=make("simulated"),
        process=make("process", accelerator="none"),
        qemu=make("qemu", usable=False),
        acme=ImportError("no acme"),
        bent=make("bent", probe_error=DriverError("cannot look", hint="look away")),
    )
    assert await choice() == ("process", "none", ["qemu", "acme", "bent", "process"])


async def test_nothing_usable_names_every_mend(installed):
    installed(
        qemu=make("qemu", usable=False, mend="apt install qemu-system-x86"), simulated=make("simulated")
    )
    with pytest.raises(DriverError, match="nothing here can run a guest for x86_64") as caught:
        await registry.choose("x86_64", {})
    assert caught.value.hint == "qemu: apt install qemu-system-x86"


@pytest.mark.parametrize("thing", [SyntaxError("bad"), make("another"), lambda: 1 / 0])
def test_a_broken_driver_is_named_with_its_owner(installed, thing):
    installed(acme=thing)
    with pytest.raises(DriverError, match="driver acme of other_acme:Driver cannot be loaded") as caught:
        registry.load("acme")
    assert "other_acme" in caught.value.hint


def test_ours_win_over_others_of_the_same_name(monkeypatch):
    ours = EntryPoint("qemu", "kenaz_drivers.qemu.driver:QemuDriver", registry.GROUP)
    theirs = EntryPoint("qemu", "evil:Driver", registry.GROUP)
    for order in ([ours, theirs], [theirs, ours]):
        monkeypatch.setattr(registry, "entry_points", lambda group, order=order: order)
        assert registry.load("qemu").__class__.__module__ == "kenaz_drivers.qemu.driver"
