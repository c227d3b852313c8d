"""The part of hivemind that we use, imported without the rest of it and without its logging.

The version is pinned, and `hivemind.averaging`, `.moe` and `.optim` are of no use here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class _LeanPackage(ModuleType):
    """A package whose `__init__` runs only if somebody wants a name that none of the modules below has."""

    names: Mapping[str, str]  # what the DHT takes from the package, and the module that it comes from

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (module := sys.modules.get(f"{self.__name__}.{name}")) is not None:
            return module  # one of its modules, still being imported
        if name in self.names:
            return getattr(importlib.import_module(f"{self.__name__}.{self.names[name]}"), name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


_UTILS = {
    "get_dht_time": "timed_storage",
    "get_logger": "logging",
    "MSGPackSerializer": "serializer",
    "SerializerBase": "serializer",
}


def _lean(name: str, names: Mapping[str, str]) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"{name} is not installed", name=name)
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _LeanPackage
    module.__dict__["names"] = names
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _import_hivemind() -> None:
    """Make hivemind's modules importable without what its packages' `__init__` drag in: torch, averaging, experts.

    That is 0.07 s and 14 MB instead of 1.7 s and 256 MB (8 instead of 58 MB where torch is needed anyway). Whoever
    imports more of hivemind in this process gets all of it: the lean packages complete themselves on demand.
    """
    if "hivemind" not in sys.modules:
        for name, names in {"hivemind": {}, "hivemind.utils": _UTILS, "hivemind.dht": {}}.items():
            _lean(name, names)
    host_level = logging.getLogger("hivemind").level
    settings = importlib.import_module("hivemind.utils.logging")
    settings.use_hivemind_log_handler("nowhere")  # it brings its own handler; the host program's is the right one
    logging.addLevelName(logging.WARNING, "WARNING")  # it renames the level, for everybody
    logging.getLogger("hivemind").setLevel(host_level or logging.ERROR)


_import_hivemind()

from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.routing import DHTID  # noqa: E402
from hivemind.dht.validation import DHTRecord, RecordValidatorBase  # noqa: E402
from hivemind.p2p import P2P, PeerID  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient, DaemonConnector  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError  # noqa: E402
from hivemind.proto import dht_pb2  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402
from hivemind.utils.timed_storage import get_dht_time  # noqa: E402

__all__ = [
    "DHTID",
    "P2P",
    "ControlClient",
    "DHTNode",
    "DHTRecord",
    "DaemonConnector",
    "Multiaddr",
    "P2PDaemonError",
    "P2PHandlerError",
    "PeerID",
    "RecordValidatorBase",
    "dht_pb2",
    "get_dht_time",
]
