"""The activities and resources of a session, declared once. The code behind them is in `activities`."""

from __future__ import annotations

from kenaz_engine.lifecycle.vocabulary import Activity, Resource, Vocabulary


def _activities(*declared: Activity) -> dict[str, Activity]:
    return {activity.name: activity for activity in declared}


def _resources(*declared: Resource) -> dict[str, Resource]:
    return {resource.name: resource for resource in declared}


_set = frozenset

VOCABULARY = Vocabulary(
    activities=_activities(
        Activity("image.ensure", acquires=_set({"image"})),
        Activity("disk.allocate", needs=_set({"image"}), acquires=_set({"disk", "config", "socket"})),
        Activity(
            "vm.start",
            needs=_set({"disk", "config", "socket"}),
            acquires=_set({"vm"}),
            waits_for_guest=True,
        ),
        Activity("channel.accept", needs=_set({"vm"}), acquires=_set({"channel"}), waits_for_guest=True),
        Activity("channel.reaccept", needs=_set({"vm"}), replaces=_set({"channel"}), waits_for_guest=True),
        Activity("session.serve", needs=_set({"vm", "channel"})),
        Activity("session.exec", needs=_set({"vm", "channel"})),
        Activity("session.drain", needs=_set({"channel"}), waits_for_guest=True),
        Activity("vm.stop", waits_for_guest=True),
        Activity("vm.kill"),
        Activity("resources.release", releases_all=True),
    ),
    resources=_resources(
        Resource("image"),
        Resource("disk"),
        Resource("config"),
        Resource("socket"),
        Resource(
            "vm",
            raises=_set({"vm.exited", "guest.panic"}),
            loses=_set({"vm.exited"}),
            alarms=_set({"guest.panic"}),
        ),
        Resource(
            "channel", raises=_set({"channel.lost", "guest.bye"}), loses=_set({"channel.lost"}), within="vm"
        ),
    ),
)
