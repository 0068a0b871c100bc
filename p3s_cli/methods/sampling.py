"""How a subject is sampled where nothing else is asked for: as its family recommends, or as the paper prints it."""

from __future__ import annotations

from dataclasses import replace

from p3s_cli import methods
from p3s_cli.config import PACES, GenerateConfig, with_schedule
from p3s_cli.sd.profile import Profile
from p3s_cli.subject import Subject

_PRINTED = {"subject_guidance": 1.0, "schedule": "quadratic"}  # injection in both halves of guidance, eq. 10


def settled(asked: GenerateConfig, profile: Profile, subject: Subject, schedule: str | None) -> GenerateConfig:
    """With s_t, s_i and the weight's schedule of the family where they are open (None).

    s_i and the schedule are the paper's for a subject tuned by its preset, and for a method without a weight to schedule.
    Raises InputError for an unknown schedule.
    """
    printed = subject.as_printed or "schedule" not in methods.get(subject.method).heeds
    own = replace(profile, **_PRINTED) if printed else profile
    config = with_schedule(asked, schedule or own.schedule)
    return replace(
        config, **{n: getattr(own, n) for n in ("guidance", "subject_guidance") if getattr(config, n) is None}
    )


def usual_reuse(subject: Subject) -> int:
    """At every how many-th step the copy runs where neither that nor a pace is asked for: at each one, as the paper prints it, for a subject tuned so."""
    return 1 if subject.as_printed else PACES[False].reuse
