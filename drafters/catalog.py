"""Every kind of drafter, one line each.

To add a kind, write one file whose ``KIND`` holds its traits and how it is built, and add its line
to ``CATALOG``; ``drafter.kind`` then selects it. A kind that learns also names its
``Trainable``.

This module imports no torch at run time: a command that only asks which kinds exist starts fast.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from configs.choices import SettingsError, known
from configs.schema import DrafterSettings

if TYPE_CHECKING:
    from drafters.protocol import DrafterContext, DrafterKind


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a kind is defined, as ``module:name``, imported on first use."""

    kind: str
    """Its ``DrafterKind``."""
    trainable: str | None = None
    """Its ``Trainable``; ``None`` if it does not learn."""
    is_model: bool = False
    """It is a causal LM of its own: new weights are those of a model that settings name."""


CATALOG = {
    "eagle3": Entry("drafters.eagle3.paged:KIND", "drafters.eagle3.trainable:Eagle3Trainable"),
    "dflash": Entry("drafters.dflash.paged:KIND", "drafters.dflash.trainable:DFlashTrainable"),
    "draft_model": Entry(
        "drafters.draft_model.paged:KIND",
        "drafters.draft_model.trainable:DraftModelTrainable",
        is_model=True,
    ),
    "p_eagle": Entry("drafters.p_eagle:KIND", "drafters.p_eagle_learning:PEagleTrainable"),
    "mtp": Entry("drafters.mtp:KIND", "drafters.mtp_learning:MtpTrainable"),
    "suffix": Entry("drafters.suffix.index:KIND"),
    "suffix_request": Entry("drafters.suffix.index:REQUEST_KIND"),
}
"""Values of ``drafter.kind``."""

NONE = "none"
"""The value of ``drafter.kind`` for plain decoding."""
_BESIDE = "suffix"
"""The kind that runs beside another one if ``drafter.suffix.enabled``."""


JOINED = "+"
"""Between the kinds of drafters that draft in one round, in the name of their mix."""

_FORMER = ":former"
"""Behind the kind of a drafter that learns: the one with its version before the newest."""


def former_name(kind: str) -> str:
    """Name of the drafter that has the former version of one that learns."""
    return kind + _FORMER


def base_of(name: str) -> str:
    """The kind in the catalog of a drafter of a server: of a former version, the drafter's."""
    return name.removesuffix(_FORMER)


def kind_of(name: str) -> DrafterKind:
    """The ``DrafterKind`` of a kind in the catalog, or of a former version of one."""
    base = base_of(name)
    kind: DrafterKind = pkgutil.resolve_name(CATALOG[base].kind)
    return kind if base == name else _as_former(kind, name, base)


def _as_former(kind: DrafterKind, name: str, base: str) -> DrafterKind:
    """The same drafter under another name, whose weights are none that a trainer updates."""
    traits = replace(kind.traits, learns=False, former_of=base)

    def build(context: DrafterContext) -> Any:
        made: Any = kind.build(context)
        made.kind, made.traits = name, traits
        return made

    return replace(kind, traits=traits, build=build)


def placed(name: str, settings: DrafterSettings, *, on_gpu: bool) -> DrafterKind:
    """The ``DrafterKind`` of a kind in the catalog, where the settings place it.

    Args:
        on_gpu: the server decodes on one.
    """
    kind, place = kind_of(name), settings.suffix.place
    is_there = place == "device" or (place == "auto" and on_gpu)
    return kind.on_device if kind.on_device is not None and is_there else kind


def chosen(settings: DrafterSettings) -> tuple[str, ...]:
    """Kinds that a server with these settings runs: the main one first, then those beside it, and
    those that draft on request last.

    Raises:
        SettingsError: ``drafter.kind``, ``drafter.beside`` or ``drafter.on_request`` names a kind
            that is not in the catalog, or ``drafter.beside`` one that is not neural; or
            ``drafter.former`` asks for versions of a drafter that has none.
    """
    return (*_ordinary(settings), *on_request(settings))


def on_request(settings: DrafterSettings) -> tuple[str, ...]:
    """Kinds that draft only for requests that name them.

    Raises:
        SettingsError: a name is not in the catalog.
    """
    asked, ordinary = settings.on_request or (), _ordinary(settings)
    for name in asked:
        known("drafter.on_request", name, CATALOG)
    return tuple(name for name in dict.fromkeys(asked) if name not in ordinary)


def _ordinary(settings: DrafterSettings) -> tuple[str, ...]:
    """Kinds that draft for every request that does not choose."""
    known("drafter.kind", settings.kind, (*CATALOG, NONE))
    if settings.kind == NONE:
        return ()
    neural = (settings.kind, *_beside(settings), *_former(settings))
    has_beside = settings.suffix.enabled and settings.kind != _BESIDE
    return (*neural, _BESIDE) if has_beside else neural


def _former(settings: DrafterSettings) -> tuple[str, ...]:
    """The former version of the main drafter, if it is kept."""
    if not settings.former:
        return ()
    if CATALOG[settings.kind].trainable is None:
        raise SettingsError(
            f"drafter.former keeps the version before the newest, but {settings.kind!r} does not "
            f"learn; set it to false"
        )
    return (former_name(settings.kind),)


def _beside(settings: DrafterSettings) -> tuple[str, ...]:
    """Kinds of the neural drafters beside the main one."""
    kinds = tuple(one.kind for one in settings.beside)
    for kind in kinds:
        known("drafter.beside", kind, CATALOG)
        if not kind_of(kind).traits.on_device:
            raise SettingsError(
                f"drafter.beside names {kind!r}, which is not neural; name it in "
                f"drafter.on_request, or leave it out"
            )
    return kinds


def mixes(
    settings: DrafterSettings, *, on_gpu: bool, are_cut: bool = False
) -> dict[str, tuple[str, ...]]:
    """Name -> kinds of the drafters that may draft in one round, each for some requests; neural
    ones first. An index on the device drafts with the main drafter alone.

    Args:
        on_gpu: see ``placed``.
        are_cut: the policy has drafts cut, which those of a mix never are: the index mixes with
            others only if that is asked for.

    Raises:
        SettingsError: ``drafter.former`` with such a mix, in which the main drafter alone drafts.
    """
    neural, former = (settings.kind, *_beside(settings)), _former(settings)
    found = [neural] if settings.mixed and len(neural) > 1 else []
    if settings.mixed and former:  # beside the one without it: there may be no former version yet
        found.append((*neural, *former))
    has_both = _BESIDE in _ordinary(settings)[1:] and kind_of(settings.kind).traits.on_device
    if has_both and settings.suffix.mixed is not False:
        picks_itself = placed(_BESIDE, settings, on_gpu=on_gpu).traits.picks_itself
        wanted = settings.suffix.mixed
        if wanted and picks_itself and former:
            raise SettingsError(
                "drafter.former needs rounds of the drafter alone, but with drafter.suffix.mixed "
                "on the device it drafts with the index only; set one of them to false"
            )
        if wanted or (picks_itself and not are_cut and not former):
            found.append((*(neural[:1] if picks_itself else neural), _BESIDE))
    return mixes_of(*found)


def mixes_of(*mixed: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Mixes by name."""
    return {JOINED.join(kinds): kinds for kinds in mixed}
