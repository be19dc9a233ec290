"""Places where runs run: this machine, a Ray cluster, Modal. Each starts commands and brings files back."""

from __future__ import annotations

from utils.ablations.places.local import LocalPlace
from utils.ablations.places.modal import ModalPlace
from utils.ablations.places.place import Place
from utils.ablations.places.ray import RayPlace

KINDS = {"local": LocalPlace, "ray": RayPlace, "modal": ModalPlace}


def find_place(name: str) -> Place:
    """The place that `--on` names: `local`, `ray`, `ray:ADDRESS` or `modal`. Raises ValueError if it cannot be used."""
    kind, _, address = name.partition(":")
    if kind not in KINDS or (address and kind != "ray"):
        raise ValueError(f"--on {name}: choose local, ray, ray:ADDRESS or modal")
    return RayPlace(address or None) if kind == "ray" else KINDS[kind]()
